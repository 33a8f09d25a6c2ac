"""From the bytes of a request to an image, boxes and options; no path or URL is ever opened.

Everything that cannot be read raises a :class:`RequestError` with its HTTP status and one line.
"""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import numpy as np
from fastapi import Request
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..structures.given_boxes import check_keys
from ..utils.file_io import json_problem
from ..utils.image_io import ImageError, load_rgb

__all__ = ["Limits", "RequestData", "RequestError", "decode_image", "read_request"]

FIELDS = ("boxes", "classes", "scores", "size")
# Pillow's plugins that decode pixels only: its EPS reader, for one, starts Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_JSON_BYTES = 2**20
MAX_NAME_LENGTH = 100  # characters of a class name
# A progressive JPEG has about 10. One of 25 megapixels takes 30 ms per scan, so that 10 MB of empty
# scans of 42 bytes would take two hours.
MAX_JPEG_SCANS = 100
_START_OF_SCAN = b"\xff\xda"  # does not occur in the compressed pixels of a JPEG
_TILE_SIZE = (322, 323)  # tags of a TIFF: width and height of its tiles
_MULTIPART_OVERHEAD = 16 * 1024  # bytes of boundaries and headers of the parts
_BINARY = "application/octet-stream"
_HINT = (
    f"send an image as image/jpeg, image/png, ... or {_BINARY}, or multipart/form-data with an "
    "image and boxes, or boxes as application/json"
)


class Limits(NamedTuple):
    """What the service accepts."""

    max_bytes: int = 10_000_000  # of an image file
    max_pixels: int = 25_000_000  # of an image
    max_boxes: int = 200  # per request; the number of pairs grows with the square
    max_requests: int = 64  # that are read, wait or are predicted at the same time
    batch_size: int = 8  # most images per model call
    seconds: float = 30.0  # to receive a request, and again to answer it


class RequestError(Exception):
    """A request that gets no prediction, with its HTTP status."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = headers


class RequestData(NamedTuple):
    """A request before its image is decoded."""

    image: bytes | None
    given: dict[str, Any]  # boxes, classes, scores and size, those that were given


async def read_request(request: Request, limits: Limits) -> RequestData:
    """Receive and parse the body of a request.

    Raises:
        RequestError: 400 for a body that cannot be parsed, 408 if it does not arrive in time, 413
            if it is too large, 415 for other media types, 422 for other fields.
        ClientDisconnect: the client has gone.
    """
    try:
        return await asyncio.wait_for(_read(request, limits), limits.seconds)
    except asyncio.TimeoutError:
        message = f"the request did not arrive within {limits.seconds:g} seconds"
        raise RequestError(408, message, {"Connection": "close"}) from None


async def _read(request: Request, limits: Limits) -> RequestData:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "Content-Encoding: send the body uncompressed")
    if media_type == "multipart/form-data":
        data = await _read_form(request, limits)
    elif media_type == "application/json":
        body = await _read_body(request, MAX_JSON_BYTES, _many_bytes("the JSON", MAX_JSON_BYTES))
        data = RequestData(None, _parse_json(body, "the body"))
    elif media_type.startswith("image/") or media_type == _BINARY:
        message = _many_bytes("the image", limits.max_bytes)
        body = await _read_body(request, limits.max_bytes, message)
        if not body:
            raise RequestError(400, "image: the body is empty")
        data = RequestData(body, {})
    else:
        found = f"Content-Type is {media_type[:100]}" if media_type else "Content-Type is missing"
        raise RequestError(415, f"{found}: {_HINT}")
    try:
        check_keys(data.given, FIELDS, (), "request")
    except ImageError as error:
        raise RequestError(422, str(error)) from None
    given = {key: value for key, value in data.given.items() if value is not None}
    _check_entities(given, limits)
    return RequestData(data.image, given)


def _many_bytes(what: str, most: int) -> str:
    return f"{what} has more than {most} bytes, the most that is accepted"


async def _chunks(request: Request, max_bytes: int, message: str) -> AsyncIterator[bytes]:
    """Yield the body; it is refused with ``message`` as early as possible if it is too large."""
    length = request.headers.get("content-length", "0")
    received = 0
    too_large = length.isdecimal() and int(length[:20]) > max_bytes
    if not too_large:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                too_large = True
                break
            yield chunk
    if too_large:
        # The connection stays open, so that clients which send everything first see the answer.
        raise RequestError(413, message)


async def _read_body(request: Request, max_bytes: int, message: str) -> bytes:
    return b"".join([chunk async for chunk in _chunks(request, max_bytes, message)])


async def _read_form(request: Request, limits: Limits) -> RequestData:
    """Read the file ``image`` and the fields ``boxes``, ``classes``, ``scores``, ``size``."""
    max_bytes = limits.max_bytes + MAX_JSON_BYTES + _MULTIPART_OVERHEAD
    fields = len(FIELDS) + 1
    message = (
        f"the form is too large: the image may have {limits.max_bytes} bytes, a field "
        f"{MAX_JSON_BYTES}"
    )
    parser = _FormParser(
        request.headers,
        _chunks(request, max_bytes, message),
        max_files=fields,
        max_fields=fields,
        max_part_size=MAX_JSON_BYTES,
    )
    parser.spool_max_size = max_bytes  # nothing is written to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = getattr(error, "message", None) or "it is not valid"
        raise RequestError(400, f"multipart/form-data: {reason}") from None
    if not parser.is_complete:  # the last fields would be missing without an error
        raise RequestError(400, "multipart/form-data: the last boundary is missing")
    image, given = None, {}
    try:
        for name, part in form.multi_items():
            if name in given or (name == "image" and image is not None):
                raise RequestError(400, f"the form has the field {name!r} twice")
            if name != "image":
                text = await part.read() if isinstance(part, UploadFile) else part.encode()
                given[name] = _parse_json(text, name) if name in FIELDS else None
            elif isinstance(part, UploadFile):
                image = await part.read()
            else:
                message = "image: send the content of a file (curl: -F image=@photo.jpg)"
                raise RequestError(422, message)
    finally:
        await form.close()
    if image is not None and len(image) > limits.max_bytes:
        raise RequestError(413, _many_bytes("the image", limits.max_bytes))
    return RequestData(image, given)


class _FormParser(MultiPartParser):
    """Notices whether the form has an end."""

    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True


def _parse_json(text: bytes, what: str) -> Any:
    if len(text) > MAX_JSON_BYTES:
        raise RequestError(413, f"{what}: more than {MAX_JSON_BYTES} bytes of JSON")
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise RequestError(400, f"{what} is not valid JSON: {json_problem(error)}") from None


def _check_entities(given: dict[str, Any], limits: Limits) -> None:
    """Refuse what is too large to be checked in detail, and names that would garble the log."""
    for key, value in given.items():
        if not isinstance(value, list):
            raise RequestError(422, f"{key}: expected a list, found a {type(value).__name__}")
        if len(value) > limits.max_boxes:
            message = f"{key}: {len(value)} of them; at most {limits.max_boxes} are accepted"
            raise RequestError(413, message)
    for index, name in enumerate(given.get("classes", ())):
        if isinstance(name, str) and not (len(name) <= MAX_NAME_LENGTH and name.isprintable()):
            raise RequestError(
                422,
                f"class {index} is not a name: expected at most {MAX_NAME_LENGTH} printable "
                "characters",
            )


def decode_image(data: bytes, limits: Limits) -> np.ndarray:
    """Decode an image as (H, W, 3) uint8 in RGB order.

    Raises:
        RequestError: 413 for too many pixels or scans, 415 if it is not an image of a known format.
        ImageError: it is broken.
    """
    most = f"{limits.max_pixels} pixels, the most that is accepted"
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(413, f"the image has more than {most}") from None
    except Exception:  # Pillow's readers fail on broken headers in many ways
        raise RequestError(
            415,
            "image: the content is not an image, or of another format than "
            f"{', '.join(IMAGE_FORMATS)}",
        ) from None
    width, height = image.size  # of the header: nothing has been decompressed
    if width * height > limits.max_pixels:
        raise RequestError(413, f"the image has {width} x {height} pixels, more than {most}")
    _check_cost(image, data, most, limits)
    return load_rgb(image)


def _check_cost(image: Image.Image, data: bytes, most: str, limits: Limits) -> None:
    """Refuse files that take much more time or memory than their size in pixels tells."""
    is_jpeg = image.format in ("JPEG", "MPO")
    if image.format == "TIFF":
        is_jpeg = "jpeg" in image.info["compression"]
        # Tiles may be larger than the image; libtiff allocates a whole one.
        width, height = (image.tag_v2.get(tag, 1) for tag in _TILE_SIZE)
        if not (isinstance(width, int) and isinstance(height, int)):
            raise ImageError("image: cannot be read as an image: the tiles have no valid size")
        if width * height > limits.max_pixels:
            message = f"the image has tiles of {width} x {height} pixels, more than {most}"
            raise RequestError(413, message)
    if is_jpeg and (scans := data.count(_START_OF_SCAN)) > MAX_JPEG_SCANS:
        message = f"the image has {scans} JPEG scans; at most {MAX_JPEG_SCANS} are accepted"
        raise RequestError(413, f"{message}: save it again without them, for example as PNG")
