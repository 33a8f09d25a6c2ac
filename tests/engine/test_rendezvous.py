"""Several machines, here processes of one: they wait for each other and say for whom."""

import multiprocessing
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from reldn_d2.engine import launch, rendezvous

from detectron2.utils import comm


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet(machine_rank, url, num_machines=3, seconds=60):
    """Meet as the only process of a machine."""
    timeout = timedelta(seconds=seconds)
    return rendezvous.meet_other_machines(
        url, machine_rank, num_machines, num_machines, machine_rank, timeout
    )


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "_REPORT_PERIOD", 0.3)


def wait_for_output(capfd, text):
    output = ""
    for _ in range(100):
        output += capfd.readouterr().out
        if text in output:
            return
        multiprocessing.connection.wait([], 0.1)
    raise AssertionError(f"no '{text}' in: {output}")


def test_meet_other_machines_prints_whom_it_waits_for(impatient, capfd):
    url = f"tcp://127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(3) as pool:
        machines = [pool.submit(meet, 1, url)]
        address = url.removeprefix("tcp://")
        wait_for_output(
            capfd, f"Waiting for the first machine (--machine-rank 0) to open {address}."
        )
        machines.append(pool.submit(meet, 0, url))
        wait_for_output(
            capfd, f"Waiting for --machine-rank 2 of 3 machines to connect to {address}.\n"
        )
        machines.append(pool.submit(meet, 2, url))
        stores = [machine.result() for machine in machines]
    assert len(stores) == 3


@pytest.mark.parametrize(
    ("machine_rank", "awaited"),
    [(0, "--machine-rank 1, 2 of 3 machines"), (1, r"the first machine \(--machine-rank 0\)")],
)
def test_meet_other_machines_missing_one_raises_after_the_timeout(machine_rank, awaited):
    with pytest.raises(TimeoutError, match=f"waited in vain for {awaited}"):
        meet(machine_rank, f"tcp://127.0.0.1:{free_port()}", seconds=1)


def write_rank(folder):
    text = f"{comm.get_world_size()} {comm.get_local_rank()} {torch.get_num_threads()}"
    (Path(folder) / str(comm.get_rank())).write_text(text)


@pytest.mark.parametrize("threads", [None, "1"])
def test_launch_two_machines_meet_and_use_the_threads_of_the_user(tmp_path, monkeypatch, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    url = f"tcp://127.0.0.1:{free_port()}"

    def machine(rank):
        launch(write_rank, 1, 2, rank, url, (str(tmp_path),), on_cpu=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(machine, range(2)))
    expected = threads or str(os.cpu_count())
    found = {x.name: x.read_text() for x in tmp_path.iterdir()}
    assert found == {str(rank): f"2 0 {expected}" for rank in range(2)}
    assert "test_rendezvous" in sys.modules  # where the processes find write_rank
