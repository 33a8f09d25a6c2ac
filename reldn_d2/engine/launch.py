"""Launching several processes with Detectron2's arguments, on GPUs or on the CPU."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..utils.compat import set_local_process_group
from ..utils.processes import end_with_parent
from ..utils.user_modules import import_modules, imported_modules
from .rendezvous import meet_other_machines

__all__ = ["LaunchError", "ProcessFailed", "check_device", "launch"]

# Seconds that the other processes have to end by themselves once one has failed.
_GRACE = 30.0


class LaunchError(ValueError):
    """Processes cannot be started as asked for; the message is one line."""


class ProcessFailed(RuntimeError):
    """One of several processes failed; the message is one line and names its rank."""


def launch(
    main_func: Callable,
    num_processes_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
    *,
    on_cpu: bool | None = None,
) -> None:
    """Run a function in several processes; Detectron2's ``launch`` needs CUDA for that.

    SIGTERM and SIGINT are passed on to the processes, which training answers with a checkpoint; a
    second signal ends them at once. If one process fails, the others are ended. If this process
    dies, so do they. Each process imports the modules of ``--module`` first.

    Args:
        main_func: called with ``args`` in every process.
        num_processes_per_machine: GPUs per machine, or processes per machine on the CPU.
        num_machines: count of all machines.
        machine_rank: index of this machine, from 0.
        dist_url: ``"tcp://FIRST_MACHINE:FREE_PORT"``; None or ``"auto"`` finds a free port, on a
            single machine only.
        args: for ``main_func``.
        timeout: how long a process waits for the others, as in Detectron2. While machines are
            missing, a line every 30 seconds names them.
        on_cpu: use gloo on the CPU; None means only if there is no CUDA. The processes of a machine
            share its cores, unless ``OMP_NUM_THREADS`` sets the threads of each.

    Raises:
        ProcessFailed: if one of the processes fails.
        SystemExit: with status 128 + signal if the processes were interrupted by a signal.
        LaunchError: if the port is missing or in use, or there are not enough GPUs.
    """
    world_size = num_machines * num_processes_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    if not on_cpu:
        _check_gpus(num_processes_per_machine)
    settings = {
        "backend": "gloo" if on_cpu else "nccl",
        "init_method": _choose_url(dist_url, num_machines, machine_rank),
        "world_size": world_size,
        "timeout": timeout,
    }
    modules = imported_modules()
    first_rank = machine_rank * num_processes_per_machine
    context = multiprocessing.get_context("spawn")
    processes = {
        first_rank
        + local_rank: context.Process(
            target=_run_process,
            args=(main_func, args, settings, modules, local_rank)
            + (num_processes_per_machine, machine_rank),
        )
        for local_rank in range(num_processes_per_machine)
    }
    _run_all(processes)


def check_device(
    device: str, num_processes_per_machine: int = 1, key: str = "MODEL.DEVICE"
) -> None:
    """Check that a device exists, before anything is loaded.

    Args:
        device: such as ``"cpu"``, ``"cuda"`` or ``"cuda:0"``.
        num_processes_per_machine: of the argument ``--num-gpus``.
        key: where the device is set, for messages; a key of a YAML or, in lower case, of a
            LazyConfig.

    Raises:
        LaunchError: if there is no such device, or there are not enough of them.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise LaunchError(
            f"{key} is '{device}', which torch does not know; use cpu, cuda or cuda:N"
        ) from None
    if wanted.type != "cuda":
        return
    _check_gpus(max(1, num_processes_per_machine), key)
    if num_processes_per_machine > 1 and wanted.index is not None:
        raise LaunchError(
            f"{key} is {device}: with --num-gpus {num_processes_per_machine} set it to cuda, so "
            "that every process uses a GPU of its own"
        )
    if (wanted.index or 0) >= torch.cuda.device_count():
        raise LaunchError(
            f"{key} is {device}, but the last CUDA device is cuda:{torch.cuda.device_count() - 1}"
        )


def _check_gpus(wanted: int, key: str = "MODEL.DEVICE") -> None:
    on_cpu = f"{key} cpu" if key.isupper() else f"{key}=cpu"
    if not torch.cuda.is_available():
        raise LaunchError(f"no CUDA device; set {on_cpu}")
    available = torch.cuda.device_count()
    if wanted > available:
        raise LaunchError(
            f"--num-gpus is {wanted}, but there are only {available} CUDA devices; use "
            f"--num-gpus {available}, or set {on_cpu}"
        )


def _choose_url(url: str | None, num_machines: int, machine_rank: int) -> str:
    """Return the URL at which the processes meet; find a free port for None and "auto"."""
    if url in (None, "auto"):
        if num_machines > 1:
            raise LaunchError(
                "Several machines need the address of the first one and a free port, such as "
                "--dist-url tcp://10.0.0.1:29500"
            )
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{server.getsockname()[1]}"
    address = urlparse(url)
    if address.scheme == "tcp" and address.port and machine_rank == 0:
        with socket.socket() as client:  # a connection works only if another run listens there
            client.settimeout(1)
            if client.connect_ex((address.hostname, address.port)) == 0:
                raise LaunchError(
                    f"port {address.port} is in use, probably by another run; choose another one "
                    "with --dist-url, or use --dist-url auto on a single machine"
                )
    return url


def _run_process(
    main_func: Callable,
    args: tuple,
    settings: dict[str, Any],
    modules: Sequence[str],
    local_rank: int,
    num_local: int,
    machine_rank: int,
) -> None:
    """Run one of the processes, in its own interpreter."""
    end_with_parent(_GRACE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C comes from the launcher, as SIGTERM
    import_modules(modules)
    if settings["backend"] != "gloo":
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))
    rank, world_size = machine_rank * num_local + local_rank, settings["world_size"]
    if world_size > num_local and settings["init_method"].startswith("tcp://"):
        url, timeout = settings.pop("init_method"), settings["timeout"]
        num_machines = world_size // num_local
        settings["store"] = meet_other_machines(
            url, rank, world_size, num_machines, machine_rank, timeout
        )
    dist.init_process_group(rank=rank, **settings)
    set_local_process_group(num_local, machine_rank)
    comm.synchronize()
    main_func(*args)
    # Not after an error: it would wait for processes that may be gone.
    dist.destroy_process_group()


def _run_all(processes: dict[int, BaseProcess]) -> None:
    """Start processes, by rank, and wait for all of them; see :func:`launch`."""
    with _forwarded_signals(list(processes.values())) as received:
        for process in processes.values():
            process.start()
            if received:  # before this process existed
                process.terminate()
        failure = _wait_for_all(processes)
    if failure is None:
        return
    rank, process = failure
    status = process.exitcode
    if received:
        raise SystemExit(128 + received[0])
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # interrupted, but not through us
        raise SystemExit(status)
    reason = f"ended with exit status {status}; its error is above"
    if status < 0:
        reason = f"was killed by signal {-status} ({signal.Signals(-status).name})"
    raise ProcessFailed(f"the process with rank {rank} (pid {process.pid}) {reason}")


def _wait_for_all(processes: dict[int, BaseProcess]) -> tuple[int, BaseProcess] | None:
    """Wait for all processes to end; return the rank and process of the first failure.

    Once one has failed, the others get SIGTERM and, after a while, SIGKILL.
    """
    running, failure, deadline = dict(processes), None, None
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait([process.sentinel for process in running.values()], left)
        if not ended:  # the deadline is over
            for process in running.values():
                process.kill()
            deadline = None
        for rank, process in list(running.items()):
            if process.sentinel not in ended:
                continue
            process.join()
            del running[rank]
            if process.exitcode != 0 and failure is None:
                failure = (rank, process)
                deadline = time.monotonic() + _GRACE
                for other in running.values():
                    other.terminate()
    return failure


@contextmanager
def _forwarded_signals(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass the first SIGINT or SIGTERM on as SIGTERM, and a second one as SIGKILL.

    Yields:
        the signals that were received so far.
    """
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        for process in processes:
            if process.pid is not None:  # started
                process.terminate() if len(received) == 1 else process.kill()

    if threading.current_thread() is not threading.main_thread():  # cannot handle signals
        yield received
        return
    before = {x: signal.signal(x, forward) for x in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
