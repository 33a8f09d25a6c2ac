"""Every YAML of ``configs/`` names what exists, trains and is evaluated by ``train_net.py``."""

import json

import pytest
from model_utils import ROOT
from sandbox import LEAVES, PRODUCERS, YAMLS, Runner, cached_download, merged, write_detections

from reldn_d2.modeling.meta_arch import needs_images
from reldn_d2.structures.relations import TASKS
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY, find_protocol

from detectron2.data import DatasetCatalog, MetadataCatalog


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
    assert cfg.TEST.RELATIONS.PROTOCOL in ("", *PROTOCOL_REGISTRY)
    metric = cfg.SOLVER.BEST_CHECKPOINT.METRIC
    if metric:
        assert "/" in metric and cfg.TEST.EVAL_PERIOD > 0
        # such as "relations_sgdet/R@n"
        assert metric.split("_")[0] in (*PROTOCOL_REGISTRY, "bbox", "confusion")


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


@pytest.fixture
def run(in_checkout):
    return Runner(in_checkout)


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


@pytest.mark.parametrize("yaml", LEAVES)
def test_config_trains_and_evaluates(yaml, run, in_checkout):
    run.provide(yaml)
    cfg = merged(yaml)
    folder = in_checkout / cfg.OUTPUT_DIR
    if is_detector(yaml):
        if not (folder / "model_final.pth").exists():
            run(yaml)
        own = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
        check_results(run(yaml, *own, flags=["--eval-only"]), folder, "bbox")
        return
    untrained = "--eval-only" in (ROOT / yaml).read_text()
    if untrained:  # the frequency baselines
        own = ()
        check_results(run(yaml, flags=["--eval-only"]), folder, "sgdet")
    else:
        run(yaml)  # ends with an evaluation
        own = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
        assert (folder / f"results_{cfg.TEST.RELATIONS.TASK}.json").exists()
    if not needs_images(cfg):
        (name,) = cfg.DATASETS.TEST
        file = write_detections(in_checkout / f"{name}.json", DatasetCatalog.get(name))
        own = (*own, "DATASETS.DETECTION_FILES_TEST", str((str(file),)))
    # The ablations differ from the config above them in losses and modules, which has run them all.
    others = set() if "/Ablations/" in yaml else set(TASKS) - {cfg.TEST.RELATIONS.TASK}
    for task in others:
        options = (*own, "TEST.RELATIONS.TASK", task)
        check_results(run(yaml, *options, flags=["--eval-only"]), folder, task)


@pytest.mark.parametrize(
    ("yaml", "train", "test"),
    [
        ("VG/reldn_VGG16", "visual_genome_attributes_train", "visual_genome_attributes_test"),
        ("VG/reldn_VGG16", "visual_genome_released_train", "visual_genome_released_val"),
        (
            "OpenImages/mini_reldn_X_101_64x4d_FPN",
            "openimages_vrd_v6_train",
            "openimages_vrd_v6_test",
        ),
        (
            "OpenImages/mini_reldn_X_101_64x4d_FPN",
            "openimages_vrd_released_train",
            "openimages_vrd_released_val",
        ),
    ],
)
def test_config_trains_on_other_files_of_the_dataset(yaml, train, test, run, in_checkout):
    """Files that no YAML names: attributes, V6, and the JSON files of the authors."""
    yaml = f"configs/{yaml}.yaml"
    run.provide(yaml)
    datasets = ("DATASETS.TRAIN", str((train,)), "DATASETS.TEST", str((test,)))
    run(yaml, *datasets, "OUTPUT_DIR", f"output/{train}")
    written = json.loads((in_checkout / f"output/{train}/results_sgdet.json").read_text())
    assert all(any("R@50" in name for name in metrics) for metrics in list(written.values())[:1])
