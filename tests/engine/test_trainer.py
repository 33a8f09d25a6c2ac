"""The trainer: resuming, interrupted writes, AMP, losses that are not finite, several processes,
rescaled schedules, the best checkpoint.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from model_utils import (
    ROOT,
    SMALL,
    busy_item,
    one_box_item,
    register_dataset,
    small_config,
    small_model,
    unregister_dataset,
    unrelated_item,
)

from reldn_d2.checkpoint import DetectorCheckpointer
from reldn_d2.data.build import TrainLoader
from reldn_d2.engine import (
    CPUAMPTrainer,
    LaunchError,
    RelDNTrainer,
    build_simple_trainer,
    check_device,
    launch,
    train_loop,
)

from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

DATASET = "training_test_set"
ITERATIONS = 20


def options(folder, *more):
    return (
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,)),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.WARMUP_ITERS", 4),
        *("INPUT.MIN_SIZE_TRAIN", (56, 64, 72), "INPUT.MAX_SIZE_TRAIN", 96, "SEED", 3),
        *("MODEL.RELDN.TRAIN_ENTITIES", "proposals", "MODEL.WEIGHTS", "", *more),
    )


@pytest.fixture
def dataset(tmp_path):
    register_dataset(DATASET, tmp_path / "images", count=7)
    yield DATASET
    unregister_dataset(DATASET)


class Record(HookBase):
    """Records the total loss per iteration; interrupts the run before iteration ``stop``."""

    def __init__(self, stop=None):
        self.losses, self.stop = {}, stop

    def before_step(self):
        if self.trainer.iter == self.stop:
            raise KeyboardInterrupt

    def after_step(self):
        latest = self.trainer.storage.latest()["total_loss"]
        self.losses[self.trainer.iter] = latest[0]


def run(folder, *more, resume=False, stop=None):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)  # for the weights; train_net.py uses SEED
    trainer = RelDNTrainer(small_config(*options(folder, *more)))
    trainer.resume_or_load(resume=resume)
    record = Record(stop)
    trainer.register_hooks([record])
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    return record.losses, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_losses_equal_an_uninterrupted_run(tmp_path, dataset, workers):
    more = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 0)
    whole, trainer = run(tmp_path / "whole", *more)
    assert len(whole) == ITERATIONS and len(set(whole.values())) == ITERATIONS
    first, _ = run(tmp_path / "cut", *more, stop=11)  # the last checkpoint is of iteration 7
    np.random.seed(99), torch.manual_seed(99)  # as in a new process
    rest, resumed = run(tmp_path / "cut", *more, resume=True)
    assert sorted(first) == list(range(11)) and sorted(rest) == list(range(8, ITERATIONS))
    difference = max(abs(whole[i] - x) for losses in (first, rest) for i, x in losses.items())
    print(f"largest difference over {ITERATIONS} iterations: {difference}")
    assert difference <= 1e-6
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_resume_after_sigkill_finds_a_complete_checkpoint(tmp_path, dataset):
    """SIGKILL at an arbitrary moment of a real run of train_net.py on the built-in dataset."""
    folder = tmp_path / "run"
    values = [*SMALL, *("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 100_000, "SEED", 1)]
    values += ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2]
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_net.py"), "--config-file"]
    command += [str(ROOT / "configs/Toy/reldn.yaml"), *(str(x) for x in values)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline, last = time.time() + 240, folder / "last_checkpoint"
        while not last.is_file() or last.read_text() < "model_0000005.pth":
            assert time.time() < deadline, "no checkpoint within 240 seconds"
            assert process.poll() is None, "train_net.py ended by itself"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    model = small_model()
    checkpointer = DetectorCheckpointer(model, str(folder))
    assert checkpointer.has_checkpoint()
    content = checkpointer.resume_or_load("", resume=True)
    assert content["iteration"] >= 5 and "optimizer" in content["trainer"]["_trainer"]


def test_save_interrupted_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = DetectorCheckpointer(small_model(seed=1), str(tmp_path))
    checkpointer.save("model_1", iteration=1)

    def half(data, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    for name in ("model_2", "model_1"):  # a new file, and one that replaces an old one
        with pytest.raises(OSError, match="No space"):
            checkpointer.save(name, iteration=2)
    monkeypatch.undo()
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"
    assert not (tmp_path / "model_2.pth").exists()
    other = DetectorCheckpointer(small_model(seed=2), str(tmp_path))
    assert other.resume_or_load("")["iteration"] == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_train_loader_seek_gives_the_same_batches(batch_size):
    sizes = [(30, 20), (20, 30), (40, 30), (30, 40), (50, 40)]
    dicts = [{"image_id": i, "width": w, "height": h} for i, (w, h) in enumerate(sizes)]

    def mapper(record):
        return {**record, "drawn": (torch.rand(1).item(), np.random.rand())}

    def loader():
        return TrainLoader(
            dicts, mapper, lambda s: TrainingSampler(5, seed=s), batch_size=batch_size, seed=11
        )

    def take(source, count):
        return list(islice(source, count))

    state = torch.get_rng_state()
    whole = take(loader(), 12)
    assert torch.equal(torch.get_rng_state(), state)  # the model's random choices are unaffected
    later = loader()
    later.seek(5)
    assert take(later, 7) == whole[5:]
    assert len({x["drawn"] for batch in whole for x in batch}) == 12 * batch_size
    for batch in whole:
        assert len({x["width"] > x["height"] for x in batch}) == 1
    other = loader()
    other.seek(0, seed=12)
    assert take(other, 12) != whole


def test_build_train_loader_reads_the_data_set_once(tmp_path, dataset, monkeypatch):
    from detectron2.data import DatasetCatalog

    read, get = [], DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: read.append(name) or get(name))
    RelDNTrainer.build_train_loader(small_config(*options(tmp_path)))
    assert read == [DATASET]


@pytest.mark.parametrize("entities", ["ground_truth", "proposals"])
def test_mixed_precision_on_cpu_trains(tmp_path, dataset, entities):
    more = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "DATASETS.TEST", ())
    more += ("MODEL.RELDN.TRAIN_ENTITIES", entities)
    losses, trainer = run(tmp_path / "amp", *more, "SOLVER.AMP.ENABLED", True)
    plain, _ = run(tmp_path / "plain", *more)
    assert isinstance(trainer._trainer, CPUAMPTrainer)
    assert len(losses) == 2 and all(np.isfinite(x) for x in losses.values())
    assert not list((tmp_path / "plain").glob("results_*.json"))  # no test set, no results
    assert losses != plain  # the precision does differ
    if entities == "ground_truth":  # of proposals, rounding changes which ones match
        assert losses[0] == pytest.approx(plain[0], rel=0.05)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_loss_not_finite_raises_with_the_images(tmp_path, dataset):
    trainer = RelDNTrainer(small_config(*options(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1)))
    trainer.resume_or_load(resume=False)

    class Spoil(HookBase):
        def before_step(self):
            if self.trainer.iter == 2:
                self.trainer.model.relation_head.spatial[-1].bias.data.fill_(float("nan"))

    trainer.register_hooks([Spoil()])
    with pytest.raises(FloatingPointError, match=r"iteration 2.*Images.*\.png") as error:
        trainer.train()
    batch = list(islice(trainer.data_loader.indices(), 3))[2]
    for index, _ in batch:
        assert trainer.data_loader.dataset[index]["file_name"] in str(error.value)
    assert str(error.value).count(".png") == 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_best_checkpoint_resume_keeps_the_best(tmp_path, dataset, monkeypatch):
    values = iter([10.0, 30.0, 20.0, 25.0, 40.0, 5.0])
    monkeypatch.setattr(
        RelDNTrainer,
        "test",
        classmethod(
            lambda cls, cfg, model, evaluators=None: {"relations_sgdet": {"R@n": next(values)}}
        ),
    )
    more = ("SOLVER.BEST_CHECKPOINT.METRIC", "relations_sgdet/R@n", "TEST.EVAL_PERIOD", 2)
    more += ("SOLVER.CHECKPOINT_PERIOD", 2)
    run(tmp_path / "run", *more, stop=6)  # 10, 30, 20
    best = tmp_path / "run" / "model_best.pth"
    assert torch.load(best, weights_only=True)["iteration"] == 3
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000005.pth"
    run(tmp_path / "run", *more, resume=True, stop=8)  # 25: not better than 30 of the first run
    assert torch.load(best, weights_only=True)["iteration"] == 3
    run(tmp_path / "run", *more, resume=True, stop=10)  # 40
    assert torch.load(best, weights_only=True)["iteration"] == 9
    content = json.loads((tmp_path / "run" / "model_best.json").read_text())
    assert content == {"metric": "relations_sgdet/R@n", "value": 40.0, "iteration": 9}


def test_best_checkpoint_unknown_metric_of_own_evaluator_raises(tmp_path, dataset, monkeypatch):
    """Names of results that only the evaluation itself knows are checked after the first one."""
    monkeypatch.setattr(RelDNTrainer, "build_evaluator", lambda *args: DatasetEvaluators([]))
    more = ("SOLVER.BEST_CHECKPOINT.METRIC", "own/metric", "TEST.EVAL_PERIOD", 1)
    with pytest.raises(ValueError, match="METRIC is 'own/metric'.*not a result"):
        run(tmp_path / "run", *more, "SOLVER.MAX_ITER", 2)


def test_reference_world_size_rescales_batch_lr_and_schedule(tmp_path, dataset):
    more = ("SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.01)
    more += ("SOLVER.MAX_ITER", 100, "SOLVER.STEPS", (60, 80), "SOLVER.WARMUP_ITERS", 10)
    trainer = RelDNTrainer(small_config(*options(tmp_path, *more)))
    solver = trainer.cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS) == (2, 400, (240, 320))
    assert solver.BASE_LR == pytest.approx(0.0025) and solver.WARMUP_ITERS == 40
    assert trainer.max_iter == 400 and len(next(iter(trainer.data_loader))) == 2


def test_build_train_loader_indivisible_batch_raises(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 2: not divisible by 4 processes"):
        RelDNTrainer.build_train_loader(small_config(*options(tmp_path)))


def test_evaluate_checkpoint_frequency_baseline_counts_the_table(tmp_path, dataset, caplog):
    """The table is counted before the evaluation, because there is nothing to train."""
    head = "MODEL.ROI_RELATION_HEAD"
    alone = [f"{head}.SPATIAL.ENABLED", False, f"{head}.SEMANTIC.FREEZE", True]
    for name in ("SPO", "SUBJECT_SKIP", "OBJECT_SKIP"):
        alone += [f"{head}.VISUAL.{name}", False]
    detector = small_model().detector.model
    DetectorCheckpointer(detector, str(tmp_path)).save("detector")
    weights = ("MODEL.WEIGHTS", str(tmp_path / "detector.pth"), "TEST.RELATIONS.TASK", "prdcls")
    cfg = small_config(*options(tmp_path / "run", *alone, *weights))
    (results,) = RelDNTrainer.evaluate_checkpoint(cfg).values()
    assert results["R@50"] > 50 and "untrained" not in caplog.text
    RelDNTrainer.evaluate_checkpoint(small_config(*options(tmp_path / "run", *weights)))
    assert "the relation head is untrained" in caplog.text
    with pytest.raises(ValueError, match="Nothing in this model is trained.*--eval-only"):
        RelDNTrainer(cfg)


def gradient_batch():
    """Four images whose pairs are all sampled, one predicate per pair: nothing is random."""
    items = [busy_item(i) for i in range(2)] + [unrelated_item(), one_box_item()]
    for x in items[:2]:
        x["relations"] = x["relations"][[0, 2, 3, 4]]
    return items


def gradient_model():
    head = "MODEL.ROI_RELATION_HEAD.SAMPLING"
    many = [
        part
        for name in ("PAIRS", "POSITIVE_PAIRS", "ANCHOR_POSITIVE_PAIRS", "ANCHOR_NEGATIVE_PAIRS")
        for part in (f"{head}.{name}", 1000)
    ]
    return small_model("MODEL.RESNETS.NORM", "FrozenBN", *many, seed=7).train()


def gradients(model, batch):
    with EventStorage():
        sum(model(batch).values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_of_two_processes(path):
    model = torch.nn.parallel.DistributedDataParallel(gradient_model())
    rank = comm.get_rank()
    assert comm.get_local_rank() == rank and comm.get_world_size() == 2
    found = gradients(model, gradient_batch()[rank::2])
    if rank == 0:
        torch.save({name[len("module.") :]: value for name, value in found.items()}, path)


@pytest.mark.parametrize("url", [None, "auto"])
def test_launch_several_machines_without_address_raises(url):
    with pytest.raises(LaunchError, match="--dist-url tcp://10.0.0.1:29500"):
        launch(one_of_two_processes, 2, num_machines=2, dist_url=url, on_cpu=True)


def test_launch_port_in_use_raises():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is in use.*--dist-url auto"):
            launch(one_of_two_processes, 2, dist_url=f"tcp://127.0.0.1:{port}", on_cpu=True)


@pytest.mark.parametrize(
    ("device", "devices", "processes", "message"),
    [
        ("cuda", 0, 1, "^no CUDA device; set MODEL.DEVICE cpu$"),
        ("cuda", 1, 2, "--num-gpus is 2, but there are only 1 CUDA devices"),
        ("cuda:0", 2, 2, "MODEL.DEVICE is cuda:0: with --num-gpus 2 set it to cuda"),
        ("cuda:1", 1, 1, "MODEL.DEVICE is cuda:1, but the last CUDA device is cuda:0"),
        ("gpu", 1, 1, "MODEL.DEVICE is 'gpu', which torch does not know; use cpu, cuda or cuda:N"),
    ],
)
def test_check_device_too_few_gpus_raises(monkeypatch, device, devices, processes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(LaunchError, match=message):
        check_device(device, processes)
    check_device("cpu", processes)
    if device == "cuda":
        with pytest.raises(LaunchError, match=message):
            launch(one_of_two_processes, 2, on_cpu=False)


def test_check_device_key_of_lazy_config_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="^no CUDA device; set train.device=cpu$"):
        check_device("cuda", key="train.device")


@pytest.mark.parametrize("start", [RelDNTrainer, RelDNTrainer.evaluate_checkpoint])
def test_trainer_cuda_without_gpu_one_line(monkeypatch, tmp_path, start):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="^no CUDA device; set MODEL.DEVICE cpu$"):
        start(small_config("MODEL.DEVICE", "cuda", "OUTPUT_DIR", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_launch_two_processes_gradients_equal_the_doubled_batch(tmp_path):
    path = tmp_path / "gradients.pth"
    launch(one_of_two_processes, 2, dist_url="auto", args=(str(path),), on_cpu=True)
    two, one = torch.load(path, weights_only=True), gradients(gradient_model(), gradient_batch())
    assert set(one) == set(two) and len(one) > 20
    assert max(float(x.abs().max()) for x in one.values()) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-4)


def run_train_net(folder, *options):
    """Run train_net.py with two processes and Detectron2's default port."""
    values = [*SMALL, *("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2)]
    values += ["DATASETS.TEST", "()", "SEED", 1, *options]
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_net.py"), "--num-gpus", "2"]
    command += ["--config-file", str(ROOT / "configs/Toy/reldn.yaml")]
    return subprocess.run(
        command + [str(x) for x in values], capture_output=True, text=True, timeout=280
    )


def test_train_net_two_cpu_processes_trains(tmp_path):
    result = run_train_net(tmp_path / "run", "MODEL.DEVICE", "cpu")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    content = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert content["iteration"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_train_net_cuda_without_gpu_one_line(tmp_path):
    result = run_train_net(tmp_path / "run", "MODEL.DEVICE", "cuda")
    assert result.returncode == 1
    assert result.stderr == "train_net.py: no CUDA device; set MODEL.DEVICE cpu\n"


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (("MODEL.DEVICE", "cpu"), 1),
        (("MODEL.DEVICE", "cpu", "MODEL.RELDN.KEEP_FREED_MEMORY", False), 0),
        (("MODEL.DEVICE", "cuda"), 0),
    ],
)
def test_build_simple_trainer_keeps_freed_memory_on_the_cpu(options, calls, monkeypatch):
    called = []
    monkeypatch.setattr(train_loop, "keep_freed_memory", lambda: called.append(True))
    model = torch.nn.Linear(1, 1)
    build_simple_trainer(small_config(*options), model, [], torch.optim.SGD(model.parameters()))
    assert len(called) == calls
