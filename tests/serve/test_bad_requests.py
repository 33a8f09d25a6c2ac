"""Bad requests to the service: each gets a status and one line, and none stops it."""

import io
import struct
import zlib

import pytest
from PIL import Image
from usage_utils import picture

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'reldn_d2[serve]'")

from serving import BOUNDARY, encoded, form, running

from reldn_d2.predictor import RelationPredictor
from reldn_d2.serve.request_reader import Limits, decode_image

LIMITS = {"max_bytes": 200_000, "max_pixels": 40_000, "max_boxes": 20}


@pytest.fixture(scope="module")
def service(predictor):
    """Serve a model with its own detector."""
    with running(predictor, **LIMITS) as service:
        yield service


@pytest.fixture(scope="module")
def boxes_service():
    """Serve a model that reads boxes and classes only."""
    with running(RelationPredictor.from_pretrained("vrd_boxes", "cpu"), **LIMITS) as service:
        yield service


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


def tiled(tile_width: int, pixels: bytes, compression: int) -> bytes:
    """Return a gray TIFF of 64 x 64 pixels in one tile, 64 pixels high.

    Args:
        tile_width: in pixels, at least 64.
        pixels: compressed.
        compression: 7 for JPEG, 8 for zlib.
    """
    tags = [(256, 64), (257, 64), (258, 8), (259, compression), (262, 1), (277, 1)]
    tags += [(322, tile_width), (323, 64), (324, 14 + 12 * 10), (325, len(pixels))]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + table + bytes(4) + pixels


def progressive(scans: int) -> bytes:
    """Return a gray JPEG of 64 x 64 pixels with so many scans, at least 6."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 90).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (scans - content.count(b"\xff\xda")) + content[-2:]


BOXES = [[5, 5, 40, 50], [30, 20, 80, 55]]
GIVEN = {"boxes": BOXES, "classes": ["person", "horse"], "scores": [0.9, 0.8]}
FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"
BINARY = "application/octet-stream"
IMAGE = encoded(picture())
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) (w) file\n%%EOF"
TWICE = form(None, boxes=BOXES).removesuffix(f"--{BOUNDARY}--\r\n".encode())
TWICE += form(None, boxes=BOXES)
BAD_REQUESTS = {
    "no body": (b"", BINARY, 400, "image: the body is empty"),
    "no image": (b"hello", BINARY, 415, "image: the content is not an image"),
    "PostScript": (EPS, BINARY, 415, "image: the content is not an image"),
    "cut image": (IMAGE[:-300], "image/png", 422, "image: cannot be read as an image: "),
    "many bytes": (b"x" * 200_001, BINARY, 413, "the image has more than 200000 bytes"),
    "many pixels": (png_header(300, 300), BINARY, 413, "300 x 300 pixels, more than 40000"),
    "bomb": (png_header(60000, 60000), BINARY, 413, "pixels, the most that is accepted"),
    "huge bomb": (png_header(2**31 - 1, 2**31 - 1), BINARY, 413, "the image has more than 40000"),
    "scans": (progressive(101), "image/jpeg", 413, "the image has 101 JPEG scans; at most 100"),
    "scans of a TIFF": (tiled(64, progressive(101), 7), BINARY, 413, "101 JPEG scans; at most 100"),
    "tiles": (tiled(640, zlib.compress(bytes(640 * 64)), 8), BINARY, 413, "of 640 x 64 pixels, mo"),
    "no type": (IMAGE, None, 415, "Content-Type is missing: send an image as image/jpeg"),
    "curl's type": (IMAGE, "application/x-www-form-urlencoded", 415, "Content-Type is applic"),
    "text": (b"x", "text/plain", 415, "multipart/form-data with an image and boxes"),
    "no JSON": (b"{boxes", JSON, 400, "the body is not valid JSON: "),
    "deep JSON": (b"[" * 100_000, JSON, 400, "the body is not valid JSON: "),
    "bytes as JSON": (b"\xff\xfe\xfa", JSON, 400, "the body is not valid JSON: "),
    "much JSON": (b" " * (2**20 + 1), JSON, 413, "the JSON has more than 1048576 bytes"),
    "a list": (b"[1]", JSON, 422, "request: expected an object with boxes, classes, scores, size"),
    "an URL": (b'{"image": "http://127.0.0.1/a.png"}', JSON, 422, "request: unknown key 'image'"),
    "a path": (b'{"file_name": "/etc/passwd"}', JSON, 422, "request: unknown key 'file_name'"),
    "text for boxes": (b'{"boxes": "/etc/passwd"}', JSON, 422, "boxes: expected a list, found"),
    "no boundary": (form(IMAGE), "multipart/form-data", 400, "Missing boundary"),
    "no end": (form(IMAGE, boxes=BOXES)[:-40], FORM, 400, "the last boundary is missing"),
    "other form": (b"what?", FORM, 400, "multipart/form-data: "),
    "twice": (TWICE, FORM, 400, "has the field 'boxes' twice"),
    "form field": (form(IMAGE, url="http://x"), FORM, 422, "request: unknown key 'url'"),
    "image as text": (form(None, image="photo.jpg"), FORM, 422, "curl: -F image=@photo.jpg"),
    "bad boxes field": (form(IMAGE, boxes=b"[1, "), FORM, 400, "boxes is not valid JSON: "),
    "long field": (form(IMAGE, boxes=b" " * 2**21), FORM, 413, "may have 200000 bytes, a field 10"),
}  # fmt: skip


@pytest.mark.parametrize("body, kind, status, message", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_predict_bad_request_says_why(service, body, kind, status, message):
    answer = service.request("POST", "/predict", body, kind)
    assert answer.status == status and message in answer.body["error"], answer
    assert "\n" not in answer.body["error"] and len(answer.body["error"]) < 520


def test_decode_image_accepts_progressive_jpeg_and_tiles():
    for content in (progressive(100), tiled(64, progressive(6), 7)):
        assert (decode_image(content, Limits()) == 90).all()
    assert decode_image(tiled(80, zlib.compress(bytes(80 * 64)), 8), Limits()).shape == (64, 64, 3)


HUGE, NAN = int("9" * 400), float("nan")
BAD_BOXES = {
    "unknown class": ({"classes": ["person", "hors"]}, "has no class 'hors'; did you mean 'horse'"),
    "class id": ({"classes": [0, 100]}, "the model has no class 100; its ids are 0 to 99"),
    "huge id": ({"classes": [0, HUGE]}, "the model has no class 999"),
    "long name": ({"classes": ["person", "x" * 101]}, "class 1 is not a name: expected at most"),
    "name of two lines": ({"classes": ["person", "a\nb"]}, "class 1 is not a name"),
    "class list": ({"classes": [["person"], 1]}, "the model has no class ['person']"),
    "few classes": ({"classes": ["person"]}, "got 1 classes for 2 boxes"),
    "no classes": ({"classes": None, "scores": None}, "give the class of each box"),
    "outside": ({"boxes": [[5, 5, 9, 9], [500, 5, 600, 50]], "size": [60, 90]}, "box 1, [500.0,"),
    "swapped": ({"boxes": [[40, 5, 5, 50], [1, 1, 9, 9]]}, "box 0, [40.0, 5.0, 5.0, 50.0], has no"),
    "NaN": ({"boxes": [[5, 5, 9, 9], [1, 1, NAN, 9]]}, "[1.0, 1.0, nan, 9.0], is not finite"),
    "null": ({"boxes": [[5, 5, 9, 9], [1, 1, None, 9]]}, "is not finite"),
    "infinite": ({"boxes": [[5, 5, 9, 9], [1, 1, float("inf"), 9]]}, "is not finite"),
    "far": ({"boxes": [[5, 5, 9, 9], [1, 1, 1e30, 9]]}, "has coordinates beyond 16777216"),
    "huge": ({"boxes": [[5, 5, 9, 9], [1, 1, HUGE, 9]]}, "expected boxes as lists of numbers"),
    "three numbers": ({"boxes": [[1, 2, 3], [1, 2, 3]]}, "boxes of shape (2, 3)"),
    "words": ({"boxes": [["a", 1, 2, 3]]}, "expected boxes as lists of numbers"),
    "fractions": ({"boxes": [[0, 0, 0.5, 1], [0, 0, 1, 1]]}, "they look divided by the image's"),
    "score": ({"scores": [0.5, 1.5]}, "the score 1.5 is not a number between 0 and 1"),
    "NaN score": ({"scores": [0.5, float("nan")]}, "the score nan is not a number"),
    "few scores": ({"scores": [0.5]}, "got 1 scores for 2 boxes"),
    "size": ({"size": [0, 5]}, "size is [0, 5]; expected height and width"),
    "infinite size": ({"size": [float("inf"), 5]}, "size is [inf, 5]; expected height and width"),
    "no boxes": ({"boxes": None}, "classes were given without boxes"),
}  # fmt: skip


@pytest.mark.parametrize("fields, message", BAD_BOXES.values(), ids=BAD_BOXES)
def test_predict_bad_boxes_say_which(boxes_service, fields, message):
    answer = boxes_service.predict(**{**GIVEN, **fields})
    assert answer.status == 422 and message in answer.body["error"], answer.body
    assert not answer.body["error"].startswith("image:")  # there is none


def test_predict_size_with_an_image_is_refused(boxes_service):
    answer = boxes_service.predict(encoded(picture()), size=[60, 90], **GIVEN)
    assert answer.status == 422 and "size was given with an image" in answer.body["error"]


def test_predict_many_boxes_are_refused(boxes_service):
    answer = boxes_service.predict(boxes=BOXES * 11, classes=["person"] * 22)
    assert answer.status == 413 and "22 of them; at most 20" in answer.body["error"]


def test_predict_compressed_body_is_refused(service):
    answer = service.request("POST", "/predict", IMAGE, BINARY, **{"Content-Encoding": "gzip"})
    assert answer.status == 415 and "uncompressed" in answer.body["error"]


@pytest.mark.parametrize(
    "query", ["topk=0", "topk=x", "min_score=2", "min_score=nan", "unknown_classes=x"]
)
def test_predict_bad_option_is_named(service, query):
    answer = service.predict(IMAGE, f"?{query}")
    assert answer.status == 422 and answer.body["error"].startswith(
        f"query: {query.split('=')[0]}: "
    )


def test_predict_image_is_missing(service, boxes_service):
    answer = service.predict(boxes=BOXES)
    assert (answer.status, answer.body["error"]) == (
        422,
        "request: this model reads pixels; give an image",
    )
    answer = boxes_service.predict(IMAGE)
    assert answer.status == 422 and answer.body["error"] == (
        "this model has no detector: send `boxes` and `classes`, or start the service with "
        "--detector"
    )
