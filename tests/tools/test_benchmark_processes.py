"""The processes that the benchmarks start: their threads, and their end."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import long_tail_benchmark
import pytest
import vrd_benchmark

from reldn_d2.utils import processes


@pytest.mark.parametrize("tool", [vrd_benchmark, long_tail_benchmark], ids=lambda x: x.__name__)
@pytest.mark.parametrize("threads", [None, "2"])
def test_run_all_workers_end_with_their_parent_and_have_the_users_threads(
    tool, threads, monkeypatch, tmp_path
):
    starts = []

    def start_pool(count, **options):
        starts.append((options["initializer"], os.environ["OMP_NUM_THREADS"]))
        return nullcontext()

    context = SimpleNamespace(Pool=start_pool)
    monkeypatch.setattr(tool.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setenv("OMP_NUM_THREADS", "of this test")
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    if tool is vrd_benchmark:
        tool.run_all([], [], None, tmp_path, 1)
    else:
        options = dict(dataset="vrd", held_out=False, seeds=[], processes=1)
        tool.run_all(SimpleNamespace(**options))
    assert starts == [(processes.start_pool_worker, threads or "1")]


def test_start_pool_worker_ends_with_parent_and_imports_the_modules(monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "end_with_parent", lambda: calls.append("end_with_parent"))
    monkeypatch.setattr(processes, "import_modules", calls.append)
    processes.start_pool_worker(("my_module",))
    assert calls == ["end_with_parent", ("my_module",)]
