"""How every benchmark measures time and memory, and prints its tables."""

import ctypes
import gc
import logging
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from reldn_d2.utils.user_modules import import_modules, imported_modules

__all__ = [
    *("Seconds", "in_fresh_process", "memory_of_call", "peak_memory", "print_table"),
    *("resident_peak", "set_up", "time_calls", "time_once"),
]

_STATUS = Path("/proc/self/status")


class Seconds(NamedTuple):
    """Wall seconds, and CPU seconds of all threads of this process."""

    wall: float
    cpu: float


def set_up(device: str, threads: int) -> None:
    """Set torch's CPU threads, silence the package's log and print what is measured on."""
    torch.set_num_threads(threads)
    logging.getLogger("reldn_d2").setLevel(logging.ERROR)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    print(f"torch {torch.__version__}, {where}, {threads} threads of {os.cpu_count()} CPUs")


def time_once(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Seconds]:
    """Call a function; return its result and its seconds, including work queued on the GPU."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    synchronize()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def time_calls(
    calls: dict[str, Callable[[], Any]], at_least: float = 2.0, rounds: int = 3
) -> dict[str, Seconds]:
    """Measure the least wall and CPU seconds of each call over several rounds, after a warm-up.

    The calls take turns, so that other load on the machine affects all of them alike.

    Args:
        calls: functions without arguments, by name.
        at_least: seconds spent in each function altogether.
        rounds: minimum number of rounds.
    """

    def repeat(call: Callable[[], Any], count: int) -> None:
        for _ in range(count):
            call()

    # A round lasts a twentieth of ``at_least`` or more: single calls may be too short to time.
    counts = {}
    for name, call in calls.items():
        call()
        once = time_once(call)[1].wall if at_least else 1.0
        counts[name] = max(1, round(at_least / 20 / max(once, 1e-6)))
    spent: dict[str, list[Seconds]] = {name: [] for name in calls}
    while any(len(x) < rounds or sum(y.wall for y in x) < at_least for x in spent.values()):
        for name, call in calls.items():
            spent[name].append(time_once(repeat, call, counts[name])[1])
    return {
        name: Seconds(*(min(x) / counts[name] for x in zip(*times)))
        for name, times in spent.items()
    }


def _resident(field: str) -> int:
    """Read a field of /proc/self/status in bytes: VmRSS is the current size, VmHWM the peak."""
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: this memory can only be measured on Linux.")


def resident_peak() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if _STATUS.exists():  # getrusage reports the parent's peak if that was larger
        return _resident("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(
    connection: Any,
    function: Callable[..., Any],
    arguments: Any,
    threads: int,
    modules: Sequence[str],
) -> None:
    torch.set_num_threads(threads)
    import_modules(modules)
    logging.getLogger("reldn_d2").setLevel(logging.ERROR)
    try:
        connection.send(function(*arguments))
    finally:
        connection.close()


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a new process, which needs picklable arguments.

    Raises:
        RuntimeError: the process failed; it has printed its error.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_child,
        args=(sender, function, arguments, torch.get_num_threads(), imported_modules()),
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        message = f"{function.__name__}{arguments} failed in its process; see its error above."
        raise RuntimeError(message) from None
    finally:
        process.join()


def memory_of_call(call: Callable[[], Any], device: str) -> float:
    """Measure how many MiB a call needs at its peak, beyond what is kept between calls.

    On the CPU this is the growth of this process's resident set (Linux only); on a GPU the
    allocator's peak.
    """
    call()  # loads libraries and allocates what is kept between calls
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_once(call)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 2**20


def _memory_of_prepared(prepare: Callable[..., Callable[[], Any]], arguments: Any) -> float:
    return memory_of_call(prepare(*arguments), "cpu")


def peak_memory(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu"
) -> float:
    """Measure the MiB of a call as :func:`memory_of_call` does; on the CPU in a new process.

    Args:
        prepare: a function of a module that returns the call to measure.
        arguments: of ``prepare``, picklable.
        device: cpu or cuda.
    """
    if not device.startswith("cuda"):
        return in_fresh_process(_memory_of_prepared, prepare, arguments)
    return memory_of_call(prepare(*arguments), device)


def print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str], title: str = "") -> None:
    """Print a table below its title."""
    print(f"\n{title}\n" if title else "")
    print(tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".2f"), flush=True)
