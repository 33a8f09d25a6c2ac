"""Every YAML of ``configs/``: what it names exists, and ``train_net.py`` trains and evaluates it."""

import importlib.util
import json
import time

import pytest
from model_utils import ROOT
from sandbox import NARROW, cached_download, write_backbone

import reldn_d2
from reldn_d2.structures.relations import TASKS
from reldn_d2.utils.protocols import PROTOCOLS, find_protocol

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

YAMLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
LEAVES = [yaml for yaml in YAMLS if not yaml.rsplit("/", 1)[1].startswith("Base-")]


def merged(yaml, *options):
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    reldn_d2.merge_config(cfg, str(ROOT / yaml), [str(x) for x in options])
    return cfg


# OUTPUT_DIR/model_final.pth of each detector config
PRODUCERS = {
    f"{cfg.OUTPUT_DIR}/model_final.pth": yaml
    for yaml in LEAVES
    if (cfg := merged(yaml)).MODEL.META_ARCHITECTURE != "RelDN"
}


def is_detector(yaml):
    return merged(yaml).MODEL.META_ARCHITECTURE != "RelDN"


def trained_by_option(weights):
    """The command of docs/detectors.md trains this detector from the config of RelDN itself."""
    return weights.startswith("output/toy/")


# ------------------------------------------------------------------------------ what a YAML names


@pytest.mark.parametrize("yaml", YAMLS)
def test_config_names_registered_datasets(yaml):
    cfg = merged(yaml)
    registered = DatasetCatalog.list()  # MetadataCatalog.get would invent what is missing
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    assert [name for name in names if name not in registered] == []
    assert names or yaml.rsplit("/", 1)[1].startswith("Base-")
    for name in names:
        evaluator_type = MetadataCatalog.get(name).evaluator_type
        assert evaluator_type == "coco" or find_protocol("", evaluator_type)


@pytest.mark.parametrize("yaml", YAMLS)
def test_config_names_known_task_protocol_and_metric(yaml):
    cfg = merged(yaml)
    assert cfg.TEST.RELATIONS.TASK in TASKS
    assert cfg.TEST.RELATIONS.PROTOCOL in ("", *PROTOCOLS)
    metric = cfg.SOLVER.BEST_CHECKPOINT.METRIC
    if metric:
        assert "/" in metric and cfg.TEST.EVAL_PERIOD > 0
        # such as "relations_sgdet/R@n"
        assert metric.split("_")[0] in (*PROTOCOLS, "bbox", "confusion")


@pytest.mark.parametrize("yaml", LEAVES)
def test_config_names_weights_that_exist_or_that_another_config_writes(yaml, tmp_path):
    weights = merged(yaml).MODEL.WEIGHTS
    if "://" in weights:
        assert cached_download(tmp_path, weights).suffix in (".pkl", ".pth")
    elif weights and not trained_by_option(weights):
        assert weights in PRODUCERS


def test_every_config_writes_into_its_own_folder():
    folders = [merged(yaml).OUTPUT_DIR for yaml in LEAVES]
    assert len(set(folders)) == len(folders)
    assert all(folder.startswith("output/") for folder in folders)


# --------------------------------------------------------------------------- train_net.py runs it


@pytest.fixture(scope="module")
def train_net():
    spec = importlib.util.spec_from_file_location("train_net_of_configs", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(in_checkout, train_net):
    """Call train_net.py in the checkout; ``run.detector`` first trains what a config starts from."""

    def run(yaml, *options, flags=()):
        values = [str(value) for value in (*NARROW, *options)]
        args = ["--config-file", yaml, *flags, *values]
        return train_net.main(default_argument_parser().parse_args(args))

    def provide(yaml):
        """Make WEIGHTS (and files with detections) of a config, unless an earlier test has."""
        cfg = merged(yaml, *NARROW)
        weights = cfg.MODEL.WEIGHTS
        if "://" in weights:
            file = cached_download(in_checkout / "cache", weights)
            if not file.exists():
                write_backbone(file, cfg)
        elif weights and not (in_checkout / weights).exists():
            if weights in PRODUCERS:
                provide(PRODUCERS[weights])
                run(PRODUCERS[weights])
            else:
                kind = "RetinaNet" if "retinanet" in yaml else "GeneralizedRCNN"
                folder = weights.removesuffix("/model_final.pth")
                options = ("MODEL.META_ARCHITECTURE", kind, "MODEL.WEIGHTS", "")
                run(yaml, *options, "OUTPUT_DIR", folder)
        if cfg.DATASETS.DETECTION_FILES_TEST:
            both = str((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
            detector = ("MODEL.WEIGHTS", weights, "DATASETS.TEST", both)
            run(PRODUCERS[weights], *detector, flags=["--eval-only"])

    run.provide = provide
    return run


def check_results(results, folder, task):
    """Finite metrics of the task, in the file and returned, and the predictions beside them."""
    written = json.loads((folder / f"results_{task}.json").read_text())
    assert written.keys() == results.keys() != set()
    for block, metrics in results.items():
        values = [value for value in metrics.values() if value == value]
        assert values and all(-1 <= value for value in values), block
    if task != "bbox":
        predictions = json.loads(
            (folder / f"inference/{task}/relation_predictions.json").read_text()
        )
        assert any(record["relations"]["scores"] for record in predictions)


# Leaves whose promise is known to be broken
BROKEN = {
    "configs/Toy/Detectors/mask_rcnn_FPN.yaml": "the built-in dataset has no masks, so the detector "
    "cannot be trained as docs/detectors.md says: toy/dataset.py has to add segmentation",
}


@pytest.mark.parametrize(
    "yaml",
    [
        (
            pytest.param(x, marks=pytest.mark.xfail(strict=True, reason=BROKEN[x]))
            if x in BROKEN
            else x
        )
        for x in LEAVES
    ],
)
def test_config_trains_and_evaluates(yaml, run, in_checkout):
    started = time.time()
    run.provide(yaml)
    cfg = merged(yaml)
    folder = in_checkout / cfg.OUTPUT_DIR
    if is_detector(yaml):
        if not (folder / "model_final.pth").exists():
            run(yaml)
        own = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
        check_results(run(yaml, *own, flags=["--eval-only"]), folder, "bbox")
        print(f"{yaml}: {time.time() - started:.1f} s")
        return
    untrained = "--eval-only" in (ROOT / yaml).read_text()
    if untrained:  # the frequency baselines
        own = ()
        check_results(run(yaml, flags=["--eval-only"]), folder, "sgdet")
    else:
        run(yaml)  # ends with an evaluation
        own = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
        assert (folder / "results_sgdet.json").exists()
    for task in ("sgcls", "prdcls"):
        options = (*own, "TEST.RELATIONS.TASK", task)
        check_results(run(yaml, *options, flags=["--eval-only"]), folder, task)
    print(f"{yaml}: {time.time() - started:.1f} s")
