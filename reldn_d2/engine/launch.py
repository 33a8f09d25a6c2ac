"""Launching several processes with Detectron2's arguments, on GPUs or on the CPU."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm

from ..utils.compat import set_local_process_group

__all__ = ["launch"]


def launch(
    main_func: Callable,
    num_processes_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    *,
    on_cpu: bool | None = None,
) -> None:
    """Run a function in several processes; Detectron2's ``launch`` needs CUDA for that.

    Args:
        main_func: called with ``args`` in every process.
        num_processes_per_machine: GPUs per machine, or processes per machine on the CPU.
        num_machines: count of all machines.
        machine_rank: index of this machine, from 0.
        dist_url: ``"tcp://FIRST_MACHINE:FREE_PORT"``; on a single machine with GPUs, ``"auto"``.
        args: for ``main_func``.
        on_cpu: use gloo on the CPU; None means only if there is no CUDA.

    Raises:
        ValueError: if several processes on the CPU get no port.
    """
    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    world_size = num_machines * num_processes_per_machine
    if not on_cpu or world_size == 1:
        launch_on_gpus(
            main_func,
            num_processes_per_machine,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
            args=args,
        )
        return
    if dist_url is None or dist_url == "auto":
        raise ValueError(
            "Several processes on the CPU need a port: --dist-url tcp://127.0.0.1:29500"
        )
    mp.start_processes(
        _run_process,
        nprocs=num_processes_per_machine,
        args=(main_func, num_processes_per_machine, num_machines, machine_rank, dist_url, args),
        start_method="spawn",
    )


def _run_process(
    local_rank: int,
    main_func: Callable,
    num_local: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=num_local * num_machines,
        rank=machine_rank * num_local + local_rank,
        timeout=timedelta(minutes=30),
    )
    try:
        set_local_process_group(num_local, machine_rank)
        comm.synchronize()
        main_func(*args)
    finally:
        dist.destroy_process_group()
