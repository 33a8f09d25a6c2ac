"""The service under load: right answers only, although some clients misbehave."""

import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from usage_utils import picture

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'reldn_d2[serve]'")

from benchmarks.service import SEEN_HEADERS, draw_requests, put_load
from serving import BOUNDARY, assert_equal, cut_off, encoded, form, running

from reldn_d2.predictor import RelationPredictor

REQUESTS, CLIENTS = 500, 16
BOXES = [[5, 5, 40, 50], [30, 20, 60, 55], [2, 9, 50, 40]]
FORM = f"multipart/form-data; boundary={BOUNDARY}"
BINARY = "application/octet-stream"


def test_service_benchmark_counts_statuses_and_finds_wrong_answers():
    predictor = RelationPredictor.from_pretrained("vrd_boxes", "cpu")
    good, bad = draw_requests(predictor)
    with running(predictor, seconds=1, max_requests=9) as service:
        row, wrong = put_load(service.port, (good, bad), 40, 4, stalled=2)
        cells = dict(zip(SEEN_HEADERS, row))
        assert wrong == [] and cells["requests"] == 40 and cells["median ms"] > 0
        for part in ("200: 24", "400: ", "413: ", "415: ", "422: ", "cut off: 4"):
            assert part in cells["statuses"], cells
        record = {**good[0].record, "relations": good[1].record["relations"]}
        row, wrong = put_load(service.port, ([good[0]._replace(record=record)], bad), 2, 2)
        assert len(wrong) == 2 == dict(zip(SEEN_HEADERS, row))["wrong"]


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def good_requests(predictor) -> list[tuple]:
    """Return body, media type and the predictor's own answer of several requests."""
    found = []
    for seed in range(4):
        pixels = picture(60, 90, seed) if seed < 3 else picture(90, 60, seed)
        found.append((encoded(pixels), BINARY, predictor(pixels)))
        given = {"boxes": BOXES, "classes": ["person", "cup", seed], "scores": [0.9, 0.8, 0.7]}
        found.append((form(encoded(pixels), **given), FORM, predictor(pixels, **given)))
    return found


def bad_requests(good: list[tuple]) -> list[tuple]:
    """Return body, media type and the status that it gets."""
    image = good[0][0]
    return [
        (image[:-200], BINARY, 422),
        (image[::-1], BINARY, 415),
        (b"x" * 150_000, BINARY, 413),
        (image, "text/html", 415),
        (b'{"boxes": [[1, 2', "application/json", 400),
        (form(image, boxes=BOXES, classes=["person", "cup", "no such class"]), FORM, 422),
        (form(image, boxes=BOXES)[:-20], FORM, 400),
    ]


def test_many_clients_get_right_answers_and_the_memory_stays(predictor):
    good = good_requests(predictor)
    bad = bad_requests(good)
    expected: Counter[int] = Counter()
    problems: list[str] = []
    lock = threading.Lock()

    def send(service, index: int) -> None:
        body, kind, graph = good[index % len(good)]
        if index % 10 == 8:
            cut_off(service.port, body, kind)
            status = 499
        elif index % 10 in (5, 6, 7):
            body, kind, status = bad[index // 10 % len(bad)]
            answer = service.request("POST", "/predict", body, kind)
            assert answer.status == status and answer.body["error"], answer
        else:
            answer = service.request("POST", "/predict", body, kind)
            status = 200
            assert answer.status == status, answer
            assert_equal(answer.body, graph)
        with lock:
            expected[status] += 1

    def client(service, first: int, count: int) -> None:
        for index in range(first, count, CLIENTS):
            try:
                send(service, index)
            except Exception as error:  # also connections that break
                problems.append(f"request {index}: {type(error).__name__}: {error}"[:500])

    def send_all(service, count: int) -> None:
        threads = [
            threading.Thread(target=client, args=(service, i, count)) for i in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with running(predictor, max_bytes=100_000) as service:
        send_all(service, 100)
        before = resident_megabytes()
        send_all(service, REQUESTS - 100)
        grown = resident_megabytes() - before
        assert service.request("GET", "/health").status == 200
    text = service.app.state.metrics.text()
    assert problems == []
    assert sum(expected.values()) == REQUESTS
    for status, count in expected.items():
        assert f'reldn_requests_total{{status="{status}"}} {count}\n' in text, (status, count, text)
    assert "reldn_requests_in_progress 0\n" in text
    assert f"reldn_images_total {expected[200]}\n" in text
    assert grown < 60, f"{grown:.0f} MB more after {REQUESTS - 100} requests"
