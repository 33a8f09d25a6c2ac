"""Waiting for the processes of other machines, and saying for which."""

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlparse

import torch.distributed as dist

__all__ = ["meet_other_machines"]

# Seconds between two lines that say whom this machine waits for.
_REPORT_PERIOD = 30.0


def meet_other_machines(
    url: str, rank: int, world_size: int, num_machines: int, machine_rank: int, timeout: timedelta
) -> dist.Store:
    """Wait until a process of every machine has come to a ``tcp://`` address.

    One process per machine prints every 30 seconds which machines are still missing.

    Args:
        url: ``"tcp://FIRST_MACHINE:FREE_PORT"``.
        rank: of this process among all.
        world_size: count of all processes.
        num_machines: count of all machines.
        machine_rank: index of this machine, from 0.
        timeout: how long to wait.

    Returns:
        The store with which ``init_process_group`` continues.

    Raises:
        TimeoutError: a machine did not come in time; the message names it.
    """
    address = urlparse(url)
    host, port = address.hostname, address.port
    is_speaker = rank == machine_rank * (world_size // num_machines)
    deadline = time.monotonic() + timeout.total_seconds()
    # The first process opens the port. torch's own attempts to connect log every failure.
    _wait_until(
        lambda: rank == 0 or _accepts_connections(host, port),
        lambda: f"the first machine (--machine-rank 0) to open {host}:{port}",
        deadline,
        is_speaker,
    )
    store = dist.TCPStore(
        host, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    store.set(_key(machine_rank), "here")

    def missing() -> list[int]:
        return [x for x in range(num_machines) if not store.check([_key(x)])]

    _wait_until(
        lambda: not missing(),
        lambda: f"--machine-rank {', '.join(map(str, missing()))} of {num_machines} machines to "
        f"connect to {host}:{port}",
        deadline,
        is_speaker,
    )
    return store


def _key(machine_rank: int) -> str:
    return f"reldn_d2_machine_{machine_rank}"


def _accepts_connections(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _wait_until(
    is_done: Callable[[], bool], awaited: Callable[[], str], deadline: float, is_speaker: bool
) -> None:
    """Wait, and print what for every 30 seconds if ``is_speaker``; raise after the deadline."""
    next_report = time.monotonic() + _REPORT_PERIOD
    while not is_done():
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"waited in vain for {awaited()}; check --dist-url and firewalls")
        if now > next_report:
            next_report += _REPORT_PERIOD
            if is_speaker:
                print(f"Waiting for {awaited()}.", flush=True)
        time.sleep(0.2)
