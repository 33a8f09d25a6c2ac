"""Problems that are known at the start of a run are one-line errors with the config key."""

import pytest
from model_utils import register_dataset, small_config, unregister_dataset

from reldn_d2.engine import RelDNTrainer, check_run
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY

from detectron2.data import MetadataCatalog

TRAIN, TEST = "run_check_train", "run_check_test"


@pytest.fixture
def datasets(tmp_path):
    for name in (TRAIN, TEST):
        register_dataset(name, tmp_path / "images", count=3)
    yield
    for name in (TRAIN, TEST):
        unregister_dataset(name)


def config(folder, *options, **kwargs):
    return small_config(
        *("OUTPUT_DIR", str(folder / "run"), "DATASETS.TRAIN", (TRAIN,), "DATASETS.TEST", (TEST,)),
        *("SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2, "SEED", 1, *options),
        **kwargs,
    )


def check(cfg, **kwargs):
    check_run(cfg, build_evaluator=RelDNTrainer.build_evaluator, **kwargs)


BEST = "SOLVER.BEST_CHECKPOINT.METRIC"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("DATASETS.TRAIN", ()), "DATASETS.TRAIN is empty; name"),
        (
            ("DATASETS.TEST", ("run_check_tets",)),
            f"DATASETS.TEST names 'run_check_tets', which is not registered. Did you mean {TEST}",
        ),
        (("DATASETS.TEST", ("qqq",)), "which is not registered. Pass --module to import the mod"),
        (("DATASETS.TEST", (), "TEST.EVAL_PERIOD", 5), "TEST.EVAL_PERIOD is 5, but DATASETS.TEST"),
        (
            ("DATASETS.DETECTION_FILES_TEST", ("no/such.json",)),
            "DATASETS.DETECTION_FILES_TEST names 'no/such.json', but there is no such file",
        ),
        (
            ("DATASETS.DETECTION_FILES_TRAIN", ("a.json", "b.json")),
            "DETECTION_FILES_TRAIN has 2 files",
        ),
        (("MODEL.LOAD_PROPOSALS", True), "DATASETS.PROPOSAL_FILES_TRAIN has 0 files"),
        (("TEST.RELATIONS.TASK", "sgdte"), "sgdte"),
        (("TEST.RELATIONS.PROTOCOL", "motif"), "motif"),
        ((BEST, "relations_sgdet/R@n"), f"{BEST} needs a TEST.EVAL_PERIOD above 0"),
        (
            ("TEST.EVAL_PERIOD", 1, BEST, "relations_sgdet/R@50", "TEST.RELATIONS.TASK", "prdcls"),
            f"{BEST} is 'relations_sgdet/R@50', .* its results are .*relations_prdcls/R@50",
        ),
        (
            ("TEST.EVAL_PERIOD", 1, "DATASETS.TEST", (TEST, TRAIN), BEST, "relations_sgdet/R@n"),
            f"{BEST} is .*{TEST}/relations_sgdet/R@n",
        ),
        (
            ("TEST.EVAL_PERIOD", 1, BEST, "relations_sgdet/R@n")
            + ("SOLVER.BEST_CHECKPOINT.MODE", "best"),
            "MODE is 'best'; known: max, min",
        ),
    ],
)
def test_check_run_problem_raises_at_the_start(tmp_path, datasets, options, message):
    cfg = config(tmp_path, *options)
    with pytest.raises(ValueError, match=message) as error:
        check(cfg)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        RelDNTrainer(cfg)


def test_check_run_missing_weights_raises_unless_resumed(tmp_path, datasets):
    cfg = config(tmp_path, "MODEL.WEIGHTS", "no/such.pth")
    for run in (check, RelDNTrainer, RelDNTrainer.evaluate_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"No checkpoint 'no/such\.pth' .MODEL.WEIGHTS"):
            run(cfg)
    check(config(tmp_path, "MODEL.WEIGHTS", "detectron2://not/fetched.pkl"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last_checkpoint").write_text("model_final.pth")
    check(cfg)
    for eval_only in (False, True):
        with pytest.raises(FileNotFoundError, match="No checkpoint 'no/such.pth'"):
            check(cfg, eval_only=eval_only, resume=False)


@pytest.mark.parametrize("iterations, warns", [(20, True), (21, False)])
def test_check_run_training_within_the_warm_up_warns(tmp_path, datasets, caplog, iterations, warns):
    options = ("SOLVER.WARMUP_ITERS", 20, "SOLVER.MAX_ITER", iterations)
    with caplog.at_level("WARNING", logger="reldn_d2"):
        check(config(tmp_path, *options))
        assert ("is within the warm-up" in caplog.text) == warns
        caplog.clear()
        check_run(config(tmp_path, *options), eval_only=True)
    assert "warm-up" not in caplog.text


@pytest.mark.parametrize(
    ("task", "protocol"),
    [("prdcls", "lu2016"), *(("sgdet", name) for name in PROTOCOL_REGISTRY)],
)
def test_check_run_accepts_exactly_the_names_of_results(tmp_path, datasets, task, protocol):
    options = ("TEST.EVAL_PERIOD", 1, "TEST.RELATIONS.PROTOCOL", protocol)
    cfg = config(tmp_path, *options, "TEST.RELATIONS.TASK", task)
    (tmp_path / "run").mkdir()
    results = RelDNTrainer.test(cfg, RelDNTrainer.build_model(cfg))
    for block, metrics in results.items():
        for metric in metrics:
            cfg.SOLVER.BEST_CHECKPOINT.METRIC = f"{block}/{metric}"
            check(cfg)
    cfg.SOLVER.BEST_CHECKPOINT.METRIC = f"{block}/{metric} "
    with pytest.raises(ValueError, match="not a result"):
        check(cfg)


def test_check_run_box_metrics_of_a_detector(tmp_path, datasets):
    for metric in ("bbox/AP50", "bbox/AP-cup"):
        check(config(tmp_path, "TEST.EVAL_PERIOD", 1, BEST, metric, config=DETECTOR))
    with pytest.raises(ValueError, match="its results are bbox/AP, .*bbox/AP50.*bbox/AP-cup"):
        check(config(tmp_path, "TEST.EVAL_PERIOD", 1, BEST, "bbox/mAP", config=DETECTOR))


DETECTOR = "configs/Toy/detector.yaml"


def test_check_run_test_set_without_evaluator_type_raises(tmp_path, datasets):
    MetadataCatalog.pop(TEST)
    MetadataCatalog.get(TEST).set(predicate_classes=["a"], thing_classes=["b"])
    with pytest.raises(ValueError, match=f"{TEST}.*evaluator_type.*TEST.RELATIONS.PROTOCOL"):
        check(config(tmp_path))


def test_check_run_missing_annotation_file_raises(tmp_path, datasets):
    missing = str(tmp_path / "no.json")
    MetadataCatalog.get(TEST).set(annotation_files=[missing])
    with pytest.raises(
        ValueError, match=f"DATASETS.TEST names '{TEST}', but there is no {missing}"
    ):
        check(config(tmp_path))
    check(config(tmp_path, "DATASETS.TEST", ()))
    check(config(tmp_path, "DATASETS.TEST", (TRAIN,), "DATASETS.TRAIN", (TEST,)), eval_only=True)


def test_check_run_output_dir_that_cannot_be_written_raises(tmp_path, datasets):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR is '.*run', where no file can be written"):
        check(config(tmp_path))
