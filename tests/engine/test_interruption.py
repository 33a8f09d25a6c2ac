"""Signals and deaths of processes during training: checkpoints, exit statuses, no orphans."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_utils import ROOT, SMALL, register_dataset, small_config, unregister_dataset
from session_members import members, wait_for_no_members

from reldn_d2.engine import ProcessFailed, RelDNTrainer, TrainingInterrupted, launch

from detectron2.engine import HookBase
from detectron2.utils import comm

DATASET = "interruption_test_set"
ITERATIONS = 8


@pytest.fixture(autouse=True)
def sigint_not_ignored():
    """Undo what shells do to background jobs: they and their children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def dataset(tmp_path):
    register_dataset(DATASET, tmp_path / "images", count=5)
    yield DATASET
    unregister_dataset(DATASET)


class Record(HookBase):
    """Records the total losses; sends ``signum`` to this process in iteration ``iteration``."""

    def __init__(self, iteration=None, signum=None):
        self.losses, self.iteration, self.signum = {}, iteration, signum

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.signum)

    def after_step(self):
        self.losses[self.trainer.iter] = self.trainer.storage.latest()["total_loss"][0]


def build_trainer(folder, *options, resume=False):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    cfg = small_config(
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,)),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.WARMUP_ITERS", 4),
        *("INPUT.MIN_SIZE_TRAIN", (56, 64), "INPUT.MAX_SIZE_TRAIN", 96, "SEED", 3, *options),
    )
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def train(trainer, record):
    trainer.register_hooks([record])
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    try:
        trainer.train()
    finally:
        assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == handlers
    return record.losses


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_signal_resumes_with_the_same_losses(tmp_path, dataset, caplog, signum, status):
    options = ("DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0)
    whole = train(build_trainer(tmp_path / "whole", *options), Record())
    caplog.set_level("INFO", "reldn_d2")
    first = Record(3, signum)
    with pytest.raises(TrainingInterrupted) as end:
        train(build_trainer(tmp_path / "cut", *options), first)
    assert end.value.code == status
    assert sum("interrupted at iteration 3; --resume" in x for x in caplog.messages) == 1
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000003.pth"
    rest = train(build_trainer(tmp_path / "cut", *options, resume=True), Record())
    assert sorted(rest) == list(range(4, ITERATIONS))
    # Hooks registered after the stop do not see iteration 3.
    assert {**first.losses, **rest} == {i: x for i, x in whole.items() if i != 3}


def test_train_signal_during_evaluation_stops_before_the_next_image(tmp_path, dataset):
    trainer = build_trainer(tmp_path / "run", "TEST.EVAL_PERIOD", 2)
    images = []

    def interrupt_first_image(model, inputs):
        if not model.training:
            images.append(inputs[0][0]["file_name"])
            if len(images) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.register_forward_pre_hook(interrupt_first_image)
    with pytest.raises(TrainingInterrupted):
        train(trainer, Record())
    assert len(images) == 1 and trainer.iter == 1
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"


def test_train_signal_during_the_final_evaluation_keeps_model_final(tmp_path, dataset):
    trainer = build_trainer(tmp_path / "run")
    with pytest.raises(TrainingInterrupted):
        train(trainer, Record(ITERATIONS - 1, signal.SIGTERM))
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    record = Record()
    train(build_trainer(tmp_path / "run", resume=True), record)
    assert not record.losses and (tmp_path / "run" / "results_sgdet.json").is_file()


def start(folder, *options, processes=1):
    """Start train_net.py on the built-in dataset, in a session of its own."""
    values = [*SMALL, *("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 100_000, "SEED", 1)]
    values += ["SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", "()"]
    values += options
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_net.py"), "--dist-url", "auto"]
    command += ["--num-gpus", str(processes)]
    command += ["--config-file", str(ROOT / "configs/Toy/reldn.yaml"), *(str(x) for x in values)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path, process):
    deadline = time.time() + 240
    while not path.is_file():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline, f"no {path}"
        time.sleep(0.05)


def end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


linux_only = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@linux_only
def test_train_net_signal_to_all_processes_writes_one_checkpoint(tmp_path):
    """As Ctrl-C in a terminal and batch systems do: ranks and loader workers get the signal too."""
    process = start(tmp_path, "DATALOADER.NUM_WORKERS", 1, processes=2)
    try:
        wait_for(tmp_path / "model_0000002.pth", process)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 130, output
        wait_for_no_members(process.pid)
    finally:
        end(process)
    assert "Traceback" not in output
    (line,) = (x for x in output.splitlines() if "interrupted at iteration" in x)
    iteration = int(line.split("interrupted at iteration ")[1].split(";")[0])
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{iteration:07d}.pth"
    content = torch.load(tmp_path / f"model_{iteration:07d}.pth", weights_only=True)
    assert content["iteration"] == content["trainer"]["iteration"] == iteration


def die_or_hang():
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)


def test_launch_killed_process_ends_the_others_and_names_its_rank(monkeypatch):
    monkeypatch.setattr(sys.modules["reldn_d2.engine.launch"], "_GRACE", 1.0)
    with pytest.raises(ProcessFailed, match=r"with rank 1 \(pid \d+\) was killed by .*SIGKILL"):
        launch(die_or_hang, 2, on_cpu=True)
    assert not multiprocessing.active_children()


def touch_and_sleep(folder):
    (Path(folder) / str(comm.get_rank())).touch()
    time.sleep(300)


@linux_only
def test_launch_killed_launcher_leaves_no_process(tmp_path):
    code = "import sys, test_interruption as t; from reldn_d2.engine import launch;"
    code += "launch(t.touch_and_sleep, 2, args=(sys.argv[1],), on_cpu=True)"
    paths = [str(ROOT), *(str(ROOT / "tests" / x) for x in ("", "engine"))]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(tmp_path / "0", process)
        wait_for(tmp_path / "1", process)
        process.kill()
        process.wait()
        wait_for_no_members(process.pid)
    finally:
        end(process)


@linux_only
def test_train_net_killed_leaves_no_loader_worker(tmp_path):
    process = start(tmp_path, "DATALOADER.NUM_WORKERS", 2)
    try:
        wait_for(tmp_path / "model_0000002.pth", process)
        assert len(members(process.pid)) >= 3
        process.kill()
        process.wait()
        wait_for_no_members(process.pid)
    finally:
        end(process)


@linux_only
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_toy_demo_killed_leaves_no_training(tmp_path, signum):
    (tmp_path / "train_net.py").write_text(
        "import pathlib, time\npathlib.Path(__file__ + '.started').touch()\ntime.sleep(300)\n"
    )
    code = "import pathlib, sys, toy_demo as t; t.PROJECT = pathlib.Path(sys.argv[1]);"
    code += "t.run_train_net('name', 'reldn', t.PROJECT / 'run', [])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(tmp_path / "train_net.py.started", process)
        assert len(members(process.pid)) == 2
        process.send_signal(signum)
        process.wait()
        wait_for_no_members(process.pid)
    finally:
        end(process)
