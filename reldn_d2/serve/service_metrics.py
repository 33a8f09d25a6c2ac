"""Counts and times of the service, in the text format of Prometheus."""

import threading
from collections import Counter

__all__ = ["Metrics"]

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds


class Metrics:
    """Counts requests and batches; all threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: Counter[int] = Counter()
        self._buckets: Counter[float] = Counter()
        self._seconds = 0.0
        self._images = self._batches = 0
        self._model_seconds = 0.0
        self.in_progress = 0  # set by the event loop alone

    def answered(self, status: int, seconds: float) -> None:
        """Count a request and the time that it took."""
        with self._lock:
            self._statuses[status] += 1
            self._seconds += seconds
            for bound in BUCKETS:
                self._buckets[bound] += seconds <= bound

    def predicted(self, images: int, seconds: float) -> None:
        """Count a batch and the time that the model took."""
        with self._lock:
            self._images += images
            self._batches += 1
            self._model_seconds += seconds

    def seconds_per_image(self) -> float:
        """Return the mean time that the model took; 0 before the first image."""
        with self._lock:
            return self._model_seconds / self._images if self._images else 0.0

    def text(self) -> str:
        """Return all values, cumulative since the start."""
        with self._lock:
            total = sum(self._statuses.values())
            lines = [
                "# HELP reldn_requests_total Requests to /predict by HTTP status; 499: cut off by "
                "the client.",
                "# TYPE reldn_requests_total counter",
                *(
                    f'reldn_requests_total{{status="{status}"}} {count}'
                    for status, count in sorted(self._statuses.items())
                ),
                "# HELP reldn_request_seconds Time from the first byte to the answer.",
                "# TYPE reldn_request_seconds histogram",
                *(
                    f'reldn_request_seconds_bucket{{le="{bound:g}"}} {self._buckets[bound]}'
                    for bound in BUCKETS
                ),
                f'reldn_request_seconds_bucket{{le="+Inf"}} {total}',
                f"reldn_request_seconds_sum {self._seconds:.6f}",
                f"reldn_request_seconds_count {total}",
            ]
            for name, kind, value, text in (
                ("requests_in_progress", "gauge", self.in_progress, "Requests being answered."),
                ("images_total", "counter", self._images, "Images that the model has seen."),
                ("batches_total", "counter", self._batches, "Calls of the model."),
                ("model_seconds_total", "counter", f"{self._model_seconds:.6f}", "Time in them."),
            ):
                lines += [f"# HELP reldn_{name} {text}", f"# TYPE reldn_{name} {kind}"]
                lines.append(f"reldn_{name} {value}")
        return "\n".join(lines) + "\n"
