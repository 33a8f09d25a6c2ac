"""RelDN as a LazyConfig: the same model as by YAML, trained and evaluated by the tool."""

import json
import re

import lazyconfig_train_net as tool
import pytest
import torch
from lazy_files import write_documented_reldn, write_lazy_detector
from model_utils import CLASSES, PREDICATES, ROOT, busy_item, write_dataset

import reldn_d2
from reldn_d2.checkpoint.reldn_checkpoint import DetectorCheckpointer
from reldn_d2.engine import LaunchError, ProcessFailed

from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

CONFIG = str(ROOT / "configs/lazy/toy_reldn.py")
DETECTOR = str(ROOT / "configs/lazy/toy_detector.py")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The checkpoint of a detector with random weights that was built by YAML."""
    cfg = reldn_d2.load_config(str(ROOT / "configs/Toy/detector.yaml"))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    DetectorCheckpointer(build_model(cfg), str(folder)).save("model_final")
    return folder / "model_final.pth"


def test_toy_reldn_is_the_model_of_the_yaml():
    ours = instantiate(LazyConfig.load(CONFIG).model)
    theirs = build_model(reldn_d2.load_config(str(ROOT / "configs/Toy/reldn.yaml")))

    def shapes(model):
        return {name: x.shape for name, x in model.state_dict().items()}

    assert shapes(ours) == shapes(theirs)
    trained = [{n for n, p in x.named_parameters() if p.requires_grad} for x in (ours, theirs)]
    assert trained[0] == trained[1]
    for name, value in vars(theirs.relation_head).items():
        if isinstance(value, (bool, int, float)) and not name.startswith("_"):
            assert getattr(ours.relation_head, name) == value, name
    assert ours.relation_head.sampler.limits == theirs.relation_head.sampler.limits


def test_lazyconfig_train_net_trains_resumes_and_evaluates(in_checkout, tmp_path, detector, capsys):
    options = [
        f"train.output_dir={tmp_path}/run",
        f"train.init_checkpoint={detector}",
        "dataloader.train.total_batch_size=2",
    ]
    config = ["--config-file", CONFIG]
    assert tool.invoke_main([*config, *options, "train.max_iter=2"]) == 0
    weights = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert weights["iteration"] == 1 and len(weights["reldn"]["predicate_classes"]) == 6
    assert bool(weights["model"]["relation_head.semantic.counted"])
    assert tool.invoke_main([*config, "--resume", *options, "train.max_iter=3"]) == 0
    assert torch.load(tmp_path / "run/model_final.pth", weights_only=True)["iteration"] == 2
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert "relations_sgdet/R@50" in json.loads(lines[-1])
    evaluated = [
        f"train.output_dir={tmp_path}/evaluated",
        f"train.init_checkpoint={tmp_path}/run/model_final.pth",
        "model.task=prdcls",
    ]
    capsys.readouterr()
    assert tool.invoke_main([*config, "--eval-only", *evaluated]) == 0


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade"])
def test_lazyconfig_train_net_documented_reldn_on_another_detector_trains(tmp_path, kind):
    detector = write_lazy_detector(tmp_path, kind)
    adapter = "CascadeRCNNDetector" if kind == "cascade" else "GeneralizedRCNNDetector"
    path = str(write_documented_reldn(tmp_path, detector, 16, adapter))
    model = tool.build(tool.load(path, []), path)
    with EventStorage():
        sum(model.train()([busy_item(0)]).values()).backward()
    with torch.no_grad():
        (result,) = model.eval()([busy_item(0)])
    assert len(result["instances"]) == 5 and len(result["relations"]) > 0


MODULE = """
import json
from pathlib import Path
from detectron2.data import DatasetCatalog, MetadataCatalog

DatasetCatalog.register("lazy_few", lambda: json.loads(Path(r"{file}").read_text()))
MetadataCatalog.get("lazy_few").set(
    thing_classes={classes}, predicate_classes={predicates}, evaluator_type="relation"
)
"""


@pytest.fixture
def few_images(tmp_path, own_registrations):
    """The --module that registers four images, and the overrides that use them."""
    file, module = tmp_path / "few.json", tmp_path / "lazy_few_images.py"
    file.write_text(json.dumps(write_dataset(tmp_path / "images")))
    module.write_text(MODULE.format(file=file, classes=CLASSES, predicates=PREDICATES))
    sets = [f"dataloader.{split}.dataset.names=lazy_few" for split in ("train", "test")]
    return ["--module", str(module)], sets


def test_lazyconfig_train_net_two_cpu_processes_train_and_evaluate(
    tmp_path, detector, few_images, capfd
):
    module, sets = few_images
    options = [
        f"train.output_dir={tmp_path}/run",
        f"train.init_checkpoint={detector}",
        "train.max_iter=2",
        "dataloader.train.total_batch_size=2",
    ]
    command = ["--config-file", CONFIG, *module, "--num-gpus", "2", "--dist-url", "auto", *sets]
    assert tool.invoke_main([*command, *options]) == 0
    weights = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert weights["iteration"] == 1 and bool(weights["model"]["relation_head.semantic.counted"])
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert "relations_sgdet/R@50" in json.loads(lines[-1])
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("copypaste: Task: relations_sgdet") == 1


@pytest.mark.parametrize("failure", [ProcessFailed, LaunchError])
def test_lazyconfig_train_net_failed_launch_ends_in_one_line(monkeypatch, capsys, failure):
    def fail(*args, **kwargs):
        raise failure("the process with rank 1 failed")

    monkeypatch.setattr(tool, "launch", fail)
    assert tool.invoke_main(["--config-file", CONFIG, "--num-gpus", "2"]) == 1
    assert capsys.readouterr().err == ("lazyconfig_train_net.py: the process with rank 1 failed\n")


def test_lazyconfig_train_net_cuda_without_gpu_prints_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["train.device=cuda", f"train.output_dir={tmp_path}/run"]
    for processes in ("1", "2"):
        command = ["--config-file", CONFIG, "--num-gpus", processes, *options]
        assert tool.invoke_main(command) == 1
        line = "lazyconfig_train_net.py: no CUDA device; set train.device=cpu\n"
        assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


def test_lazyconfig_train_net_without_evaluator_skips_the_evaluation():
    assert tool.evaluate(tool.load(CONFIG, ["dataloader.evaluator=null"]), None) == {}


def test_lazyconfig_train_net_build_freezes_unused_maps(in_checkout):
    override = "model.relation_head.in_features=[p2,p3]"
    scales = "model.relation_head.predicate_pooler.scales=[0.25,0.125]"
    config = tool.load(CONFIG, [override, scales])
    body = tool.build(config, CONFIG).predicate_backbone
    frozen = {n.rpartition(".")[0] for n, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"fpn_output4"}


@pytest.mark.parametrize(
    "config, options, message",
    [
        (CONFIG, ["model.relation_head.num_predicates=5"], "relation_head has 5 predicate_classes"),
        (CONFIG, ["model.detector.model.roi_heads.num_classes=4"], "detector has 4 thing_classes"),
        (CONFIG, ["model.nothing.at_all=4"], "override 'model.nothing.at_all=4' of"),
        (
            CONFIG,
            ["train.init_checkpoint=no/such.pth"],  # found before the images are drawn
            r"No checkpoint 'no/such\.pth' \(train\.init_checkpoint\)",
        ),
        (CONFIG, ["model.nothing=4"], "model cannot be built: TypeError"),
        (DETECTOR, [], "has no dataloader, optimizer, lr_multiplier, train"),
        ("none.py", [], "No config file 'none.py', neither below .* configs/lazy/toy_reldn.py"),
        ("", [], "No --config-file given; for instance --config-file configs/lazy/toy_reldn.py"),
        (
            "configs/Toy/reldn.yaml",
            [],
            r"is not a LazyConfig .* train_net.py \(reldn-train\) takes YAML",
        ),
    ],
)
def test_lazyconfig_train_net_unusable_prints_one_line(
    in_checkout, tmp_path, capsys, config, options, message
):
    folder = [f"train.output_dir={tmp_path}"] if config == CONFIG else []
    assert tool.invoke_main(["--config-file", config, *folder, *options]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lazyconfig_train")]
    assert re.search(message, line)
