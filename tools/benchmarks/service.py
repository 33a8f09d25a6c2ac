"""Put load on the HTTP service: rates, waiting times and memory, and whether the answers are right.

``python -m reldn_d2.serve --pretrained vrd_boxes`` runs in a process of its own and gets
docs/photo.jpg in several sizes, with boxes. Of ten requests, three are malformed and one is cut off
in the middle; other clients send half a request and stall. Every answer is compared with the
predictor's own. The second run has more clients than the service admits, so that some get status
503. Clients and service share the CPUs. Linux only, for the memory.
"""

import argparse
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.image_io import decode_rgb

from .measure import print_table

__all__ = ["Server", "add_arguments", "draw_requests", "put_load", "run", "served"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
FORM, BINARY, JSON = (
    "multipart/form-data; boundary=x-x",
    "application/octet-stream",
    "application/json",
)
SEEN_HEADERS = ("requests", "s", "requests/s", "median ms", "95 %", "99 %", "statuses", "wrong")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--requests", type=int, default=500, help="per run (default: 500)")
    parser.add_argument("--clients", type=int, default=16, help="of the first run (default: 16)")
    parser.add_argument("--stalled", type=int, default=16, help="stalled clients (default: 16)")
    parser.add_argument("--crowd", type=int, default=96, help="of the second run (default: 96)")


def run(args: argparse.Namespace) -> None:
    """Start the service, put load on it twice and print the tables.

    Raises:
        RuntimeError: an answer was wrong.
    """
    predictor = RelationPredictor.from_pretrained("vrd_boxes", "cpu")
    requests = draw_requests(predictor)
    options = ["--pretrained", "vrd_boxes", "--device", "cpu"]
    rows, problems = [], []
    with served(options, {**os.environ, "OMP_NUM_THREADS": str(args.threads)}) as server:
        put_load(server.port, requests, 2 * args.clients, args.clients)  # warm-up
        memory = [server.megabytes("VmRSS")]
        for clients, stalled in ((args.clients, args.stalled), (args.crowd, args.stalled)):
            row, wrong = put_load(server.port, requests, args.requests, clients, stalled)
            rows.append([f"{clients}, and {stalled} stalled", *row, server.megabytes("VmHWM")])
            problems += wrong
            memory.append(server.megabytes("VmRSS"))
    print_table(rows, ["clients", *SEEN_HEADERS, "peak MB"], "Times are those of answers with 200")
    print("Memory after the warm-up and each run, MB:", *(f"{x:.0f}" for x in memory))
    if problems:
        raise RuntimeError(f"{len(problems)} answers were wrong; the first: {problems[0]}")


class Server(NamedTuple):
    """A running service."""

    port: int
    process: subprocess.Popen

    def megabytes(self, field: str) -> float:
        """Read its memory from /proc: VmRSS is the current size, VmHWM the peak."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1000


@contextmanager
def served(options: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """Run ``python -m reldn_d2.serve`` on any free port.

    Raises:
        RuntimeError: it did not start, or has not ended with status 0; with its log.
    """
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "reldn_d2.serve", *options, "--port", "0"]
        process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            end = time.monotonic() + 120
            text = Path(log.name)
            while not (found := re.search(r"http://127.0.0.1:(\d+)", text.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the service has not started: {text.read_text()}")
                time.sleep(0.1)
            yield Server(int(found[1]), process)
            process.terminate()
            if process.wait(90) or "Traceback" in text.read_text():
                raise RuntimeError(f"status {process.returncode}: {text.read_text()}")
        finally:
            process.kill()
            process.wait()


class Request(NamedTuple):
    """A request and its answer."""

    body: bytes
    media_type: str
    status: int
    record: dict[str, Any] | None = None  # the JSON of the right answer; None for an error


def _form(image: bytes, given: dict[str, Any]) -> bytes:
    head = b'--x-x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    parts = [head % (key.encode(), b"", json.dumps(x).encode()) for key, x in given.items()]
    return b"".join([*parts, head % (b"image", b'; filename="photo.jpg"', image), b"--x-x--\r\n"])


def draw_requests(predictor: RelationPredictor) -> tuple[list[Request], list[Request]]:
    """Return good and malformed requests, from docs/photo.jpg in several sizes."""
    photo = Image.open(DOCS / "photo.jpg")
    given = json.loads((DOCS / "photo_boxes.json").read_text())["photo.jpg"]
    good = []
    for scale in np.linspace(0.5, 2, 12):
        buffer = io.BytesIO()
        photo.resize([round(scale * x) for x in photo.size]).save(buffer, "JPEG")
        image = buffer.getvalue()
        scaled = {**given, "boxes": (scale * np.array(given["boxes"])).round().tolist()}
        record = json.loads(predictor(decode_rgb(image, "photo"), **scaled).to_json())
        good.append(Request(_form(image, scaled), FORM, 200, record))
    classes = [*given["classes"][:-1], "no such class"]
    bad = [
        Request(_form(image[:-9000], given), FORM, 422),
        Request(_form(image, {**given, "classes": classes}), FORM, 422),
        Request(_form(image, given)[:-9], FORM, 400),
        Request(b'{"boxes": [[1, 2', JSON, 400),
        Request(image, "text/html", 415),
        Request(bytes(10_000_001), BINARY, 413),
    ]
    return good, bad


def _is_right(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Compare two records; batches of other sizes round scores in another way."""
    return all(
        (
            np.allclose(found[part][key], values, rtol=1e-4, atol=1e-4)
            if isinstance(values[0], float) or key == "boxes"
            else found[part][key] == values
        )
        for part in ("instances", "relations")
        for key, values in expected[part].items()
    )


def _send(port: int, request: Request) -> tuple[str, float, str]:
    """Send a request; return its status, the seconds, and what is wrong, "" if nothing is."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/predict", request.body, {"Content-Type": request.media_type})
        response = connection.getresponse()
        status, answer = response.status, json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return "broken", 0.0, f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    seconds = time.perf_counter() - started
    is_busy = status == 503 and response.getheader("Retry-After")
    if is_busy or status == request.status and request.record is None and answer["error"]:
        return str(status), seconds, ""
    is_right = status == request.status and _is_right(answer, request.record)
    return str(status), seconds, "" if is_right else f"{status} {str(answer)[:200]}"


def _send_half(port: int, request: Request) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {request.media_type}\r\n"
    head += f"Content-Length: {len(request.body)}\r\n\r\n"
    connection.sendall(head.encode() + request.body[: len(request.body) // 2])
    return connection


def _stall(port: int, request: Request, stop: threading.Event, statuses: Counter[str]) -> None:
    """Send half a request, again and again, and wait until the service gives it up."""
    while not stop.is_set():
        with _send_half(port, request) as connection:
            connection.settimeout(0.2)
            while not stop.is_set():
                try:
                    answer = connection.recv(12).decode()  # HTTP/1.1 408
                except TimeoutError:
                    continue
                except ConnectionError:
                    answer = ""
                statuses[f"{answer[9:] or 'closed'} (stalled)"] += 1
                break
        stop.wait(0.5)


def put_load(
    port: int,
    requests: tuple[list[Request], list[Request]],
    count: int,
    clients: int,
    stalled: int = 0,
) -> tuple[list[Any], list[str]]:
    """Send requests from several clients at the same time.

    Args:
        port: of the service.
        requests: good and malformed ones, of :func:`draw_requests`.
        count: requests that are sent.
        clients: that send them.
        stalled: further clients, which stall.

    Returns:
        The cells of a row below ``SEEN_HEADERS``, and the wrong answers.
    """
    good, bad = requests

    def send(index: int) -> tuple[str, float, str]:
        if index % 10 == 8:
            _send_half(port, good[index % len(good)]).close()
            return "cut off", 0.0, ""
        if index % 10 in (5, 6, 7):
            return _send(port, bad[(index // 10 * 3 + index % 10) % len(bad)])
        return _send(port, good[index % len(good)])

    stop, of_stalled = threading.Event(), Counter()
    stalling = [
        threading.Thread(target=_stall, args=(port, good[0], stop, of_stalled))
        for _ in range(stalled)
    ]
    for thread in stalling:
        thread.start()
    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(clients) as pool:
            results = list(pool.map(send, range(count)))
        seconds = time.perf_counter() - started
    finally:
        stop.set()
        for thread in stalling:
            thread.join()
    statuses = Counter(status for status, _, _ in results) + of_stalled
    times = 1000 * np.array([x for status, x, _ in results if status == "200"] or [np.nan])
    problems = [problem for _, _, problem in results if problem]
    text = ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items()))
    percentiles = np.percentile(times, (50, 95, 99))
    return [count, seconds, count / seconds, *percentiles, text, len(problems)], problems
