"""How the benchmarks measure: seconds, peak memory, and the table that they print."""

import argparse
import ctypes
import gc
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils import benchmark

__all__ = [
    "add_device_arguments",
    "describe",
    "least_seconds",
    "peak_memory",
    "print_table",
    "seconds",
]


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--threads``."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")


def describe(device: str, threads: int) -> str:
    """What the figures were measured on, in a line."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return f"torch {torch.__version__}, {where}, {threads} threads of {os.cpu_count()} CPUs"


def seconds(function: Callable[[], Any], threads: int = 2, at_least: float = 1.0) -> float:
    """Median seconds of one call, the device's queue emptied, after a warm-up.

    Args:
        function: takes no argument.
        threads: CPU threads of torch.
        at_least: seconds that all calls together take at least.
    """
    timer = benchmark.Timer("f()", globals={"f": function}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=at_least).median


def least_seconds(
    functions: dict[Any, Callable[[], Any]], threads: int = 2, at_least: float = 1.0
) -> dict[Any, float]:
    """Seconds of one call of each function, in the round that was disturbed least.

    The functions take turns, so that whatever else the machine does meets all of them.

    Args:
        functions: by name; they take no argument.
        threads: CPU threads of torch.
        at_least: seconds that each function is called for, after a warm-up.
    """
    timers = {
        name: benchmark.Timer("f()", globals={"f": function}, num_threads=threads)
        for name, function in functions.items()
    }
    numbers = {
        name: max(1, round(at_least / 20 / max(timer.timeit(1).mean, 1e-6)))
        for name, timer in timers.items()
    }
    found: dict[Any, list[float]] = {name: [] for name in timers}
    while any(sum(found[name]) * numbers[name] < at_least for name in timers):
        for name, timer in timers.items():
            found[name].append(timer.timeit(numbers[name]).mean)
    return {name: min(times) for name, times in found.items()}


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at its largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def _child(connection, prepare, arguments, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        call = prepare(*arguments)
        call()  # loads libraries, fills what stays
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _resident("VmRSS")
        call()
        connection.send(_resident("VmHWM") - before)
    finally:
        connection.close()


def peak_memory(
    prepare: Callable[..., Callable[[], Any]],
    *arguments: Any,
    device: str = "cpu",
    threads: int = 2,
) -> int:
    """Bytes that a call needs at its peak beyond what stays from the call before.

    On the CPU it is run in a process of its own, by the growth of its resident set (Linux
    only); on a GPU by the allocator's peak.

    Args:
        prepare: a function of a module, called with ``arguments``; returns the call to measure.
        arguments: picklable.
        device: cpu or cuda.
        threads: CPU threads of torch.

    Raises:
        RuntimeError: the process failed; its error stands above.
    """
    if device.startswith("cuda"):
        call = prepare(*arguments)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(sender, prepare, arguments, threads)
    )
    process.start()
    sender.close()
    try:
        grown = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{prepare.__name__}{arguments} failed in its process.") from None
    finally:
        process.join()
    return grown


def print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str], title: str = "") -> None:
    """Print a table, its title above."""
    if title:
        print(f"\n{title}")
    print(tabulate(rows, headers=headers, tablefmt="pipe"), flush=True)
