"""A running service for tests, and clients that need the standard library only."""

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

BOUNDARY = "x-boundary-x"


class Answer(NamedTuple):
    """Status, headers and parsed JSON of an answer."""

    status: int
    headers: dict[str, str]
    body: Any


class Service(NamedTuple):
    """The address of a running service and its application."""

    port: int
    app: Any

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content_type: str | None = None,
        **headers: str,
    ) -> Answer:
        """Send a request and return the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if content_type is not None:
            headers["Content-Type"] = content_type
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        found = {key.lower(): value for key, value in response.getheaders()}
        is_json = found.get("content-type", "") == "application/json"
        return Answer(
            response.status, found, json.loads(text) if is_json and text else text.decode()
        )

    def predict(self, image: bytes | None = None, query: str = "", **fields: Any) -> Answer:
        """Send an image, fields as JSON, or both as a form."""
        path = f"/predict{query}"
        if image is None:
            return self.request("POST", path, json.dumps(fields).encode(), "application/json")
        if not fields:
            return self.request("POST", path, image, "application/octet-stream")
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return self.request("POST", path, form(image, **fields), kind)


def form(image: bytes | None, /, **fields: Any) -> bytes:
    """Return a multipart body with an image and fields, which are JSON unless they are bytes."""
    parts = []
    for name, value in fields.items():
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        parts.append((f'name="{name}"', text))
    if image is not None:
        parts.append(('name="image"; filename="photo.jpg"', image))
    lines = [
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
        % (BOUNDARY.encode(), head.encode(), text)
        for head, text in parts
    ]
    return b"".join(lines) + b"--%s--\r\n" % BOUNDARY.encode()


def encoded(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    """Return the file of an image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def assert_equal(found: dict, graph) -> None:
    """Assert that an answer is the predictor's, up to the rounding of other batches."""
    expected = json.loads(graph.to_json())
    assert found.keys() == expected.keys()
    for part in ("instances", "relations"):
        assert found[part].keys() == expected[part].keys()
        for key, values in expected[part].items():
            if key in ("boxes", "scores", "predicate_scores"):
                np.testing.assert_allclose(found[part][key], values, rtol=1e-5, atol=1e-3)
            else:
                assert found[part][key] == values, key
    rest = [
        {k: v for k, v in x.items() if k not in ("instances", "relations")}
        for x in (found, expected)
    ]
    assert rest[0] == rest[1]


def cut_off(port: int, body: bytes, kind: str) -> None:
    """Send half of a request and hang up."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode() + body[: len(body) // 2])


@contextmanager
def running(predictor: Any, detector: Any = None, **limits: Any) -> Iterator[Service]:
    """Run a service in a thread, on any free port."""
    import uvicorn

    from reldn_d2.serve.__main__ import bind, server_config
    from reldn_d2.serve.request_reader import Limits
    from reldn_d2.serve.service import create_app

    limits = Limits(**limits)
    app = create_app(predictor, detector, limits, "test model")
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app, limits.seconds))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield Service(listener.getsockname()[1], app)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
