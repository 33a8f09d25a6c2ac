"""``train_net.py``: its arguments, and whole runs on a small registered dataset."""

import importlib.util
import json
import re
import runpy
import sys

import pytest
import torch
from model_utils import ROOT, SMALL, register_dataset, small_model, unregister_dataset

from reldn_d2 import RelDNCheckpointer
from reldn_d2.config import UnknownKeyError
from reldn_d2.utils.user_modules import add_module_argument

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser

DATASET = "train_net_test_set"
FILE = ROOT / "train_net.py"


@pytest.fixture
def dataset(tmp_path):
    register_dataset(DATASET, tmp_path / "images")
    yield
    unregister_dataset(DATASET)


@pytest.fixture(scope="module")
def train_net():
    spec = importlib.util.spec_from_file_location("train_net_under_test", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(folder, *options, config="reldn.yaml", flags=()):
    """Parse arguments with Detectron2's own parser, as on the command line."""
    values = (
        *SMALL,
        *("OUTPUT_DIR", folder, "DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,)),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 96),
        *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "SEED", 1, *options),
    )
    file = str(ROOT / "configs/Toy" / config)
    return default_argument_parser().parse_args(
        ["--config-file", file, *flags, *(str(value) for value in values)]
    )


def save_detector(folder):
    DetectionCheckpointer(
        small_model(config="configs/Toy/detector.yaml", seed=4), str(folder)
    ).save("detector")
    return folder / "detector.pth"


def recall(results):
    return {name: value for name, value in results.items() if name.startswith("R@")}


def test_train_net_help_is_detectron2s_and_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(FILE), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FILE), run_name="__main__")
    assert end.value.code == 0
    expected = default_argument_parser()
    add_module_argument(expected)
    assert capsys.readouterr().out == expected.format_help()
    for name in ("--config-file", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url"):
        assert name in default_argument_parser().format_help()


@pytest.mark.parametrize("task", ["sgdet", "sgcls", "prdcls"])
def test_main_trains_and_evaluates_the_task(tmp_path, dataset, train_net, task):
    folder = tmp_path / "run"
    weights = save_detector(tmp_path)
    options = ("MODEL.WEIGHTS", weights, "TEST.RELATIONS.TASK", task)
    train_net.main(arguments(folder, *options))
    results = json.loads((folder / f"results_{task}.json").read_text())
    (values,) = (x for x in results.values() if any(name.startswith("R@") for name in x))
    assert all(0 <= value <= 100 for value in recall(values).values())
    if task == "prdcls":  # few pairs, boxes given, 100 triplets per image: most are found
        assert max(recall(values).values()) > 50
    losses = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert any("loss_predicate" in line and line["total_loss"] > 0 for line in losses)
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert content["iteration"] == 1 and bool(content["model"]["relation_head.semantic.counted"])

    again = train_net.main(
        arguments(
            folder, *options, "MODEL.WEIGHTS", folder / "model_final.pth", flags=["--eval-only"]
        )
    )
    again = json.loads(json.dumps(again))
    for name, metrics in results.items():
        assert recall(again[name]) == pytest.approx(recall(metrics))


def test_main_resume_trains_the_remaining_iterations(tmp_path, dataset, train_net):
    folder = tmp_path / "run"
    weights = ("MODEL.WEIGHTS", save_detector(tmp_path), "TEST.RELATIONS.TASK", "prdcls")
    train_net.main(arguments(folder, *weights))
    train_net.main(arguments(folder, *weights, "SOLVER.MAX_ITER", 3, flags=["--resume"]))
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 2


def test_main_detector_config_trains_and_evaluates_it(tmp_path, dataset, train_net):
    train_net.main(arguments(tmp_path / "run", config="detector.yaml"))
    results = json.loads((tmp_path / "run" / "results_bbox.json").read_text())
    assert "AP" in results["bbox"]
    model = small_model(seed=3)
    RelDNCheckpointer(model).load(str(tmp_path / "run" / "model_final.pth"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            ("SOLVER.BASE_RL", 1),
            UnknownKeyError,
            "SOLVER.BASE_RL in the command line.*SOLVER.BASE_LR",
        ),
        (("SEED",), ValueError, "'SEED' has no value"),
        (("MODEL.WEIGHTS", "no/such.pth"), FileNotFoundError, "No checkpoint 'no/such.pth'"),
        (
            ("DATASETS.TRAIN", ("no_such_set",)),
            ValueError,
            "DATASETS.TRAIN names 'no_such_set', which is not registered",
        ),
        (
            ("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 9),
            ValueError,
            f"NUM_PREDICATES is 9, but the dataset '{DATASET}' has 6 predicate_classes",
        ),
        (
            ("MODEL.ROI_HEADS.NUM_CLASSES", 57),
            ValueError,
            f"NUM_CLASSES is 57, but the dataset '{DATASET}' has 9 thing_classes",
        ),
    ],
)
def test_main_wrong_options_raises(tmp_path, dataset, train_net, options, error, message):
    with pytest.raises(error, match=message):
        train_net.main(arguments(tmp_path / "run", *options))


def test_main_missing_config_file_raises(tmp_path, train_net):
    args = default_argument_parser().parse_args(["--config-file", str(tmp_path / "no.yaml")])
    with pytest.raises(FileNotFoundError, match="No config file '.*no.yaml'"):
        train_net.main(args)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("my.py", (), "my.py is a LazyConfig, not a YAML file.*reldn-lazy-train"),
        ("none.yaml", (), "No config file 'none.yaml'"),
        ("broken.yaml", (), "broken.yaml or one of its bases is not valid YAML: .*line 3"),
        ("configs/Toy/reldn.yaml", ("SOLVER.BASE_RL", "1"), "SOLVER.BASE_RL in the command line"),
        ("configs/Toy/reldn.yaml", ("SEED",), "'SEED' has no value"),
        ("configs/Toy/reldn.yaml", ("MODEL.DEVICE", "gpu"), "MODEL.DEVICE is 'gpu', which torch"),
        (
            "configs/Toy/reldn.yaml",
            ("DATASETS.TRAIN", "('no_set',)"),
            "DATASETS.TRAIN names 'no_se",
        ),
        ("configs/Toy/reldn.yaml", ("MODEL.META_ARCHITECTURE", "No"), "META_ARCHITECTURE is 'No'"),
        ("configs/Toy/reldn.yaml", ("MODEL.WEIGHTS", "none.pth"), "No checkpoint 'none.pth'"),
    ],
)
def test_invoke_main_wrong_config_exits_with_one_line(
    tmp_path, dataset, train_net, monkeypatch, config, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").touch()
    (tmp_path / "broken.yaml").write_text("SEED: 1\nMODEL: [\n")
    sets = ("DATASETS.TRAIN", f"('{DATASET}',)", "DATASETS.TEST", "()")
    values = [str(x) for x in (*SMALL, *sets, *options)]
    monkeypatch.setattr(sys, "argv", ["/bin/reldn-train", "--config-file", config, *values])
    with pytest.raises(SystemExit) as end:
        train_net.invoke_main()
    assert re.fullmatch(f"reldn-train: .*{message}.*", end.value.code)


@pytest.mark.parametrize("options", [[], ["MODEL.DEVICE", "cpu"]])
def test_invoke_main_without_config_file_exits_with_one_line(train_net, monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["/bin/reldn-train", *options])
    with pytest.raises(SystemExit) as end:
        train_net.invoke_main()
    assert end.value.code == (
        "reldn-train: No --config-file given; for instance --config-file "
        "configs/VRD/reldn_boxes.yaml"
    )


def test_main_logs_statistics_of_the_relation_head(tmp_path, dataset, train_net):
    folder = tmp_path / "run"
    options = ("MODEL.WEIGHTS", save_detector(tmp_path), "SOLVER.MAX_ITER", 20)
    train_net.main(arguments(folder, *options))
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    (scalars,) = (line for line in lines if "reldn/class_agnostic_margin" in line)
    assert scalars["iteration"] == 19 and scalars["reldn/num_positive_pairs"] > 0
    assert "pairs: iter: 19" in (folder / "log.txt").read_text()
    assert "class_agnostic_violated: " in (folder / "log.txt").read_text()
