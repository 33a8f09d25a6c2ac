"""The application: its routes, and the way of a request from its bytes to the answer."""

import asyncio
import base64
import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reldn_d2 import __version__

from ..data.prediction_input import ImageInput
from ..predictor import RelationPredictor
from ..structures.given_boxes import ENTITY_KEYS
from ..structures.scene_graph import SceneGraph
from ..utils.image_io import ImageError
from .prediction_worker import Detector, PredictionWorker, fail
from .request_reader import Limits, RequestData, RequestError, decode_image, read_request
from .service_metrics import Metrics

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

DECODERS = 2  # threads that decode and check images while the model runs
STALLED = 4  # times the timeout: a model that has been busy for longer does not answer any more
_MAX_MESSAGE = 500  # characters; a message may quote what the client sent


def create_app(
    predictor: RelationPredictor,
    detector: Detector | None = None,
    limits: Limits | None = None,
    name: str = "model",
) -> FastAPI:
    """Return the application: ``/``, ``/predict``, ``/model``, ``/health`` and ``/metrics``.

    Args:
        predictor: the model; the application's thread owns it while it runs.
        detector: finds the entities of images without boxes; None if the model does, or if
            requests have to bring boxes.
        limits: None means the default limits.
        name: of the model, for the page.
    """
    service = _Service(predictor, detector, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.close()

    # FastAPI's own pages of documentation load their scripts from other servers.
    app = FastAPI(
        title="RelDN", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.metrics = service.metrics
    app.add_middleware(_CountRequests, metrics=service.metrics)
    _add_error_handlers(app)
    page, policy = _page()

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.post("/predict", response_class=Response, openapi_extra=_BODY)
    async def predict(
        request: Request,
        topk: Annotated[int | None, Query(ge=1, description="most relations returned")] = None,
        min_score: Annotated[float, Query(ge=0, le=1, description="least score of these")] = 0.0,
        unknown_classes: Annotated[
            Literal["error", "leave_out"],
            Query(description="what happens to boxes whose class name the model does not have"),
        ] = "error",
    ) -> Response:
        graph = await service.answer(request, unknown_classes)
        text = graph.best(topk, min_score).to_json()
        return Response(text, media_type="application/json")

    @app.get("/model")
    async def model() -> dict[str, Any]:
        return {"name": name, "version": __version__, **service.description()}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        status = service.health()
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class _Service:
    """Admits requests, decodes their images in a few threads and hands them to the worker."""

    def __init__(self, predictor: RelationPredictor, detector: Detector | None, limits: Limits):
        self.predictor = predictor
        self.detector = detector
        self.limits = limits
        self.metrics = Metrics()
        self.worker = PredictionWorker(predictor, detector, limits.batch_size, self.metrics)
        self._decoders = asyncio.Semaphore(DECODERS)
        # Decoded images are much larger than files: few of them are in memory at a time.
        self._decoded = asyncio.Semaphore(2 * limits.batch_size)

    def health(self) -> str:
        """Return "ok", or "stalled" or "stopped" if the model does not answer."""
        if not self.worker.is_alive:
            return "stopped"
        return "stalled" if self.worker.busy_seconds > STALLED * self.limits.seconds else "ok"

    def description(self) -> dict[str, Any]:
        """Return what a client has to know about the model."""
        return {
            "thing_classes": self.predictor.thing_classes,
            "predicate_classes": self.predictor.predicate_classes,
            "needs_image": self.predictor.reads_images,
            "needs_boxes": self.predictor.needs_detections and self.detector is None,
            "needs_classes": self.predictor.needs_detections,
            "limits": self.limits._asdict(),
        }

    async def answer(self, request: Request, unknown_classes: str) -> SceneGraph:
        """Return the scene graph of a request.

        Raises:
            RequestError: it cannot be read, there are too many requests, or it takes too long.
            ClientDisconnect: the client has gone before it has sent everything.
        """
        metrics, limits = self.metrics, self.limits
        if metrics.in_progress >= limits.max_requests:
            message = f"busy: {limits.max_requests} requests are being answered; try again later"
            raise self._unavailable(message)
        metrics.in_progress += 1
        try:
            data = await read_request(request, limits)
            predicting = self._predict(data, unknown_classes)
            return await asyncio.wait_for(predicting, limits.seconds)
        except asyncio.TimeoutError:
            message = f"busy: no answer within {limits.seconds:g} seconds; try again later"
            raise self._unavailable(message) from None
        except (ImageError, RequestError) as error:
            error.__traceback__ = None  # as in fail(): its frames refer to the request
            if isinstance(error, RequestError):
                raise
            raise RequestError(422, str(error)) from None
        finally:
            metrics.in_progress -= 1

    def _unavailable(self, message: str) -> RequestError:
        """Return status 503; a client should wait about as long as those before it take."""
        seconds = self.metrics.in_progress * self.metrics.seconds_per_image()
        return RequestError(503, message, {"Retry-After": str(min(max(math.ceil(seconds), 1), 60))})

    async def _predict(self, data: RequestData, unknown_classes: str) -> SceneGraph:
        deadline = time.monotonic() + self.limits.seconds
        await self._decoded.acquire()
        work = asyncio.ensure_future(self._decode_and_predict(data, unknown_classes, deadline))
        work.add_done_callback(self._finished)
        # A timeout cancels the wait, but neither a thread that decodes nor a model call: the image
        # counts as decoded until these have let go of it. Otherwise a model that hangs would
        # collect the images of all requests that time out.
        await asyncio.wait([work])
        try:
            return work.result()
        finally:
            del work  # as in fail()

    def _finished(self, work: "asyncio.Future[SceneGraph]") -> None:
        self._decoded.release()
        if not work.cancelled():
            work.exception()  # after a timeout nobody else looks at it, which asyncio would log

    async def _decode_and_predict(
        self, data: RequestData, unknown_classes: str, deadline: float
    ) -> SceneGraph:
        async with self._decoders:
            if time.monotonic() > deadline:
                raise asyncio.TimeoutError
            prepared = await _in_thread(self._prepare, data, unknown_classes)
        return await asyncio.wrap_future(self.worker.submit(prepared, deadline))

    def _prepare(self, data: RequestData, unknown_classes: str) -> ImageInput | np.ndarray:
        """Decode and check; return the model's input, or an image for the detector."""
        has_entities = not data.given.keys().isdisjoint(ENTITY_KEYS)
        if self.predictor.needs_detections and not has_entities:
            if self.detector is None:
                raise RequestError(
                    422,
                    "this model has no detector: send `boxes` and `classes`, or start the service "
                    "with --detector",
                )
            if data.image is None:
                raise RequestError(422, "send an image, or `boxes` and `classes`")
        rgb = None if data.image is None else decode_image(data.image, self.limits)
        if self.detector is not None and rgb is not None and not data.given:
            return rgb
        # The image is decoded: errors are about the other fields.
        return self.predictor.read_input(
            rgb, "request", unknown_classes=unknown_classes, **data.given
        )


def _in_thread(function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
    """Run a function in a thread of its own.

    Unlike the threads of an executor, one that hangs does not keep the process from ending.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            fail(future, error)

    threading.Thread(target=run, name="decoder", daemon=True).start()
    return asyncio.wrap_future(future)


class _CountRequests:
    """Counts the requests to ``/predict``, whichever way they end, and their seconds."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self.app(scope, receive, send)
        status, started = 500, time.perf_counter()

        async def send_and_note(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self.metrics.answered(status, time.perf_counter() - started)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    line = " ".join(message.split())
    line = line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + " ..."
    return JSONResponse({"error": line}, status, headers)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with ``{"error": "one line"}``."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _error(error.status, str(error), error.headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.url.path}: {error.detail}", error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_option(request: Request, error: RequestValidationError) -> Response:
        found = "; ".join(f"{x['loc'][-1]}: {x['msg']}" for x in error.errors())
        return _error(422, f"query: {found}")

    @app.exception_handler(ClientDisconnect)
    async def cut_off(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; the metrics count it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, "internal error; the log of the service has the reason")


def _page() -> tuple[str, str]:
    """Return the page and the policy that lets a browser run its own script and nothing else."""
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy


_ARRAYS = {
    "boxes": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        "description": "x0, y0, x1, y1 in pixels",
    },
    "classes": {"type": "array", "items": {"type": ["string", "integer"]}},
    "scores": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}},
    "size": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "height and width, without an image",
    },
}
_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
            "application/json": {"schema": {"type": "object", "properties": _ARRAYS}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": _FILE, **_ARRAYS}}
            },
        },
    }
}
