"""The HTTP service: its answers equal the predictor's, and it stays well under load."""

import gc
import socket
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from usage_utils import picture

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'reldn_d2[serve]'")

from serving import BOUNDARY, assert_equal, cut_off, encoded, form, running

from reldn_d2.predictor import RelationPredictor
from reldn_d2.serve import prediction_worker
from reldn_d2.serve import service as service_module
from reldn_d2.serve.request_reader import RequestData
from reldn_d2.utils.image_io import ImageError

BOXES = [[5, 5, 40, 50], [30, 20, 80, 55]]
GIVEN = {"boxes": BOXES, "classes": ["person", "horse"], "scores": [0.9, 0.8]}


@pytest.fixture(scope="module")
def service(predictor):
    """Serve a model with its own detector."""
    with running(predictor, max_bytes=200_000, max_pixels=40_000, max_boxes=20) as service:
        yield service


@pytest.fixture(scope="module")
def boxes_predictor():
    return RelationPredictor.from_pretrained("vrd_boxes", device="cpu")


@pytest.fixture(scope="module")
def boxes_service(boxes_predictor):
    """Serve a model that reads boxes and classes only."""
    with running(boxes_predictor, max_bytes=200_000, max_pixels=40_000, max_boxes=20) as service:
        yield service


def test_predict_image_equals_the_predictor(service, predictor):
    image = encoded(picture())
    answer = service.predict(image)
    assert answer.status == 200 and len(answer.body["relations"]["scores"]) > 10
    assert_equal(answer.body, predictor(picture()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_predict_reads_the_formats_of_the_predictor(service, predictor, tmp_path, kind):
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(seed=3), kind))
    found, expected = service.predict(path.read_bytes()).body, predictor(path)
    assert found["relations"]["pairs"] == expected.pairs.tolist()
    assert "file_name" not in found


def test_predict_rotated_photo_is_turned_upright(service, predictor, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(40, 90)).save(tmp_path / "photo.jpg", exif=exif)
    answer = service.predict((tmp_path / "photo.jpg").read_bytes())
    assert (answer.body["height"], answer.body["width"]) == (90, 40)
    np.testing.assert_allclose(
        answer.body["instances"]["boxes"], predictor(tmp_path / "photo.jpg").boxes, atol=1e-3
    )


def test_predict_image_and_boxes_of_a_form(service, predictor):
    for given in (
        {"boxes": BOXES},
        {"boxes": BOXES, "classes": ["person", "cup"], "scores": [1, 0.5]},
    ):
        answer = service.predict(encoded(picture()), **given)
        assert answer.status == 200, answer.body
        assert_equal(answer.body, predictor(picture(), **given))


def test_predict_boxes_alone_equal_the_predictor(boxes_service, boxes_predictor):
    for given in (GIVEN, {**GIVEN, "size": [60, 90]}, {**GIVEN, "scores": None}):
        assert_equal(boxes_service.predict(**given).body, boxes_predictor(**given))
    image = encoded(picture())
    assert_equal(boxes_service.predict(image, **GIVEN).body, boxes_predictor(picture(), **GIVEN))
    empty = boxes_service.predict(boxes=[], classes=[])
    assert empty.status == 200 and empty.body["relations"]["pairs"] == []


def test_predict_options_choose_the_best_relations(service, predictor):
    image, graph = encoded(picture()), predictor(picture())
    assert_equal(service.predict(image, "?topk=3").body, graph.best(3))
    least = float(graph.scores[5])
    found = service.predict(image, f"?min_score={least * 0.9999}").body["relations"]["scores"]
    assert len(found) == (graph.scores >= least * 0.9999).sum() and min(found) > least * 0.99


def test_predict_unknown_class_is_left_out_if_asked_for(boxes_service, boxes_predictor):
    given = {"boxes": [*BOXES, [1, 1, 9, 9]], "classes": ["person", "horse", "sheep"]}
    answer = boxes_service.predict(**given)
    assert answer.status == 422 and "the model has no class 'sheep'" in answer.body["error"]
    answer = boxes_service.predict(query="?unknown_classes=leave_out", **given)
    assert answer.body["left_out"] == {"2": "sheep"}
    assert_equal(answer.body, boxes_predictor(**given))


def test_predict_detector_finds_the_entities(boxes_predictor):
    found = {**GIVEN, "boxes": np.array(BOXES, np.float32), "classes": ["person", "zebra"]}
    shapes = []

    def detector(rgb):
        shapes.append(rgb.shape)
        if rgb.shape[0] == 61:
            raise ImageError("image: the detector cannot use it")
        return found

    with running(boxes_predictor, detector) as service:
        assert_equal(service.predict(encoded(picture())).body, boxes_predictor(picture(), **found))
        assert service.predict(encoded(picture()), **GIVEN).status == 200  # replaces detections
        assert shapes == [(60, 90, 3)]
        answer = service.predict(size=[60, 90])
        assert answer.body == {"error": "send an image, or `boxes` and `classes`"}
        answer = service.predict(encoded(picture(61)))
        assert (answer.status, answer.body["error"]) == (422, "image: the detector cannot use it")
        assert service.request("GET", "/model").body["needs_boxes"] is False


BINARY = "application/octet-stream"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
IMAGE = encoded(picture())


def test_other_routes_answer_in_json(service):
    assert service.request("GET", "/predict").status == 405
    answer = service.request("GET", "/docs")  # FastAPI's page would load scripts of other servers
    assert (answer.status, answer.body) == (404, {"error": "/docs: Not Found"})
    for path in ("/", "/health"):
        answer = service.request("HEAD", path)
        assert (answer.status, answer.body) == (200, "")


def test_model_describes_what_to_send(service, boxes_service, predictor):
    about = service.request("GET", "/model").body
    assert about["thing_classes"] == predictor.thing_classes and about["limits"]["max_boxes"] == 20
    needs = [
        [x.request("GET", "/model").body[f"needs_{y}"] for y in ("image", "boxes", "classes")]
        for x in (service, boxes_service)
    ]
    assert needs == [[True, False, False], [False, True, True]]


def test_openapi_describes_the_fields(service):
    answer = service.request("GET", "/openapi.json").body["paths"]["/predict"]["post"]
    assert answer["requestBody"]["content"].keys() == {
        "image/*",
        BINARY,
        "application/json",
        "multipart/form-data",
    }
    assert [x["name"] for x in answer["parameters"]] == ["topk", "min_score", "unknown_classes"]


def metric(service, name: str) -> float:
    for line in service.request("GET", "/metrics").body.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    return 0.0


def test_metrics_count_requests_and_images(service):
    names = (
        "reldn_images_total",
        'reldn_requests_total{status="200"}',
        'reldn_requests_total{status="415"}',
        "reldn_request_seconds_count",
    )
    before = [metric(service, x) for x in names]
    service.predict(IMAGE)
    service.predict(b"no image")
    assert [metric(service, x) - y for x, y in zip(names, before)] == [1, 1, 1, 2]
    lines = service.request("GET", "/metrics").body.splitlines()
    assert all(line.startswith("# ") or len(line.rsplit(" ", 1)) == 2 for line in lines)
    assert metric(service, "reldn_requests_in_progress") == 0


def test_metrics_count_cut_off_requests(service):
    name = 'reldn_requests_total{status="499"}'
    before = metric(service, name)
    for body in (IMAGE, form(IMAGE)):
        kind = BINARY if body is IMAGE else FORM
        cut_off(service.port, body, kind)
    end = time.monotonic() + 10
    while metric(service, name) < before + 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert metric(service, name) == before + 2


def test_slow_request_times_out(predictor):
    with running(predictor, seconds=0.3) as service:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        head += b"Content-Length: 999\r\n\r\nx"
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
            connection.sendall(head)
            text = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        assert text.startswith("HTTP/1.1 408") and "did not arrive within 0.3 seconds" in text


class Gate:
    """A predictor whose model waits until it is let through."""

    def __init__(self, predictor):
        self.open = threading.Event()
        self.prepared = 0
        self.images: list[weakref.ref] = []  # those that were prepared
        self.batches: list[int] = []
        self.predictor = predictor

    def __getattr__(self, name):
        return getattr(self.predictor, name)

    def read_input(self, *args, **given):
        found = self.predictor.read_input(*args, **given)
        self.images.append(weakref.ref(found.record["image"]))
        self.prepared += 1  # in two threads, of which one holds the lock of the interpreter
        return found

    def predict_inputs(self, inputs):
        self.batches.append(len(inputs))
        assert self.open.wait(20)
        return self.predictor.predict_inputs(inputs)


def send_together(service, count: int) -> tuple[list, list[threading.Thread]]:
    """Start requests, one after the other; return where their answers will be."""
    answers: list = [None] * count

    def send(index):
        answers[index] = service.predict(IMAGE)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    return answers, threads


def wait_for_requests(gate: Gate, count: int) -> None:
    """Wait until so many images are prepared, and a little longer until they are queued."""
    end = time.monotonic() + 20
    while gate.prepared < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)


def test_concurrent_requests_share_a_batch_and_a_full_queue_refuses(predictor):
    gate = Gate(predictor)
    with running(gate, max_requests=6, batch_size=4) as service:
        answers, threads = send_together(service, 6)
        wait_for_requests(gate, 6)
        refused = service.predict(IMAGE)
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.body["error"] == "busy: 6 requests are being answered; try again later"
        assert service.request("GET", "/health").body == {"status": "ok"}
        gate.open.set()
        for thread in threads:
            thread.join()
        for answer in answers:
            assert_equal(answer.body, predictor(picture()))
        assert sum(gate.batches) == 6 and max(gate.batches) == 4
        assert service.predict(IMAGE).status == 200


def wait_for_health(service, status: int, body: dict) -> None:
    """Wait until ``/health`` gives an answer."""
    end = time.monotonic() + 20
    while (answer := service.request("GET", "/health")).body != body:
        assert time.monotonic() < end, answer
        time.sleep(0.05)
    assert answer.status == status


def test_requests_that_wait_too_long_are_told_so_and_cost_nothing(predictor, monkeypatch):
    monkeypatch.setattr(service_module, "STALLED", 1)
    gate = Gate(predictor)
    with running(gate, seconds=1, batch_size=1) as service:
        for _ in range(3):
            answers, threads = send_together(service, 4)
            for thread in threads:
                thread.join()
            assert [x.status for x in answers] == [503] * 4
            assert "no answer within 1 seconds" in answers[0].body["error"]
        assert sum(x() is not None for x in gate.images) <= 2  # twice the batch size
        wait_for_health(service, 503, {"status": "stalled"})
        gate.open.set()
        wait_for_health(service, 200, {"status": "ok"})
    assert gate.batches == [1]  # those that waited were not predicted


def test_service_stops_although_a_model_call_and_a_decoder_hang(predictor, monkeypatch):
    monkeypatch.setattr(prediction_worker, "CLOSE_SECONDS", 0.1)
    gate = Gate(predictor)
    decode = service_module.decode_image

    def hang(data, limits):
        return decode(data, limits) if data == IMAGE else gate.open.wait(20)

    monkeypatch.setattr(service_module, "decode_image", hang)
    started, others = time.monotonic(), threading.enumerate()
    with running(gate, seconds=1) as service:
        assert [service.predict(x).status for x in (IMAGE, b"slow")] == [503, 503]
    assert time.monotonic() - started < 10
    hanging = [x for x in threading.enumerate() if x not in others]
    assert len(hanging) == 2 and all(x.daemon for x in hanging)  # the process may end
    gate.open.set()
    for thread in hanging:
        thread.join()


def test_refused_requests_keep_no_file_in_memory(service):
    bodies = [form(IMAGE, boxes=BOXES, classes=["person", "no class"]), form(IMAGE[:-300])]
    gc.collect()
    gc.disable()  # which would find cycles, but only now and then
    try:
        for body in bodies:
            assert service.request("POST", "/predict", body, FORM).status == 422
        end = time.monotonic() + 10
        while any(type(x) is RequestData for x in gc.get_objects()):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        gc.enable()


def test_malformed_http_gets_status_400(service):
    for line in (b"GET /health", b"\x16\x03\x01\x02\x00", b"GET /\x00 HTTP/1.1"):
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
            connection.sendall(line + b"\r\n\r\n")
            text = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        assert text.startswith("HTTP/1.1 400 ") and "text/plain" in text, text
    assert service.request("GET", "/health").status == 200


def test_failing_image_does_not_fail_its_batch(predictor, caplog):
    class Failing(Gate):
        def predict_inputs(self, inputs):
            if any(x.record["height"] == 61 for x in inputs):
                raise RuntimeError("secret reason")
            return super().predict_inputs(inputs)

    gate = Failing(predictor)
    with running(gate, batch_size=8) as service:
        first, threads = send_together(service, 1)
        wait_for_requests(gate, 1)
        bad = SimpleNamespace(answer=None)
        threads.append(
            threading.Thread(
                target=lambda: setattr(bad, "answer", service.predict(encoded(picture(61))))
            )
        )
        threads[-1].start()
        more, others = send_together(service, 2)
        wait_for_requests(gate, 4)
        gate.open.set()
        for thread in [*threads, *others]:
            thread.join()
        assert [x.status for x in (*first, *more)] == [200] * 3
        assert bad.answer.status == 500 and "secret" not in bad.answer.body["error"]
        assert service.request("GET", "/health").status == 200
    assert "secret reason" in caplog.text


def test_predict_answers_what_has_begun_when_the_service_stops(predictor):
    gate = Gate(predictor)
    with running(gate) as service:
        answers, threads = send_together(service, 2)
        wait_for_requests(gate, 2)
        threading.Timer(0.5, gate.open.set).start()
    for thread in threads:
        thread.join()
    assert [x.status for x in answers] == [200, 200]
