"""Checkpoints of detectors and of RelDN: loading, saving, resuming, and files that do not fit."""

import pickle
from urllib.error import URLError

import pytest
import torch
from model_utils import (
    CLASSES,
    PREDICATES,
    busy_item,
    empty_item,
    give_distinct_statistics,
    one_box_item,
    register_dataset,
    small_config,
    small_model,
    unregister_dataset,
    unrelated_item,
)

import reldn_d2
from reldn_d2 import RelDNCheckpointer, initialize_relation_branch
from reldn_d2.checkpoint import DetectorCheckpointer, build_checkpointer
from reldn_d2.engine import RelDNTrainer, ensure_frequency_table
from reldn_d2.engine.model_setup import check_counts
from reldn_d2.modeling.relation_head.predictors import SemanticModule

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathHandler, PathManager

DETECTOR = "configs/Toy/detector.yaml"
DATASET = "checkpoint_test_set"


@pytest.fixture
def detector():
    """A "trained" detector: every weight and statistic differs from any initialization."""
    model = small_model(config=DETECTOR, seed=5)
    give_distinct_statistics(model)
    return model


@pytest.fixture
def dataset(tmp_path):
    register_dataset(DATASET, tmp_path / "images")
    yield DATASET
    unregister_dataset(DATASET)


def write(model, folder, kind):
    """Save a detector as Detectron2 or its model zoo does; return the path."""
    if kind == "pth":
        DetectionCheckpointer(model, str(folder)).save("detector", iteration=7)
        return str(folder / "detector.pth")
    if kind == "module prefix":
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
        torch.save({"model": state}, folder / "detector.pth")
        return str(folder / "detector.pth")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    with open(folder / "detector.pkl", "wb") as file:
        pickle.dump({"model": state, "__author__": "x"}, file)
    return str(folder / "detector.pkl")


def assert_equal_state(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["pth", "pkl", "module prefix"])
def test_load_detector_checkpoint_initializes_the_relation_branch(tmp_path, detector, kind):
    path = write(detector, tmp_path, kind)
    model = small_model()
    before = {n: p.clone() for n, p in model.relation_head.visual.state_dict().items()}
    RelDNCheckpointer(model).load(path)
    assert_equal_state(model.detector.model, detector)
    assert_equal_state(model.predicate_backbone, detector.backbone)
    assert len(model.relation_head.box_heads) == 3
    for box_head in model.relation_head.box_heads:
        assert_equal_state(box_head, detector.roi_heads.box_head)
        assert box_head[-1].__class__ is torch.nn.Identity
    # Copies, not the same tensors: the branch is trained, the detector is frozen.
    pointers = {p.data_ptr() for p in model.detector.parameters()}
    assert not pointers & {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert all(not p.requires_grad for p in model.detector.parameters())
    for name, value in model.relation_head.visual.state_dict().items():
        assert torch.equal(value, before[name])


def test_load_detector_checkpoint_keeps_its_detections(tmp_path, detector):
    model = small_model()
    RelDNCheckpointer(model).load(write(detector, tmp_path, "pth"))
    batch = [busy_item(0)]
    with torch.no_grad():
        (alone,), (ours,) = detector.eval()(batch), model.eval()(batch)
    for name, value in alone["instances"].get_fields().items():
        found = ours["instances"].get(name)
        torch.testing.assert_close(getattr(found, "tensor", found), getattr(value, "tensor", value))


@pytest.mark.parametrize("off", ["SPO", "SUBJECT_SKIP", "OBJECT_SKIP"])
def test_load_detector_checkpoint_visual_part_off_initializes_the_others(tmp_path, detector, off):
    model = small_model(f"MODEL.ROI_RELATION_HEAD.VISUAL.{off}", False)
    RelDNCheckpointer(model).load(write(detector, tmp_path, "pth"))
    for box_head in model.relation_head.box_heads:
        assert_equal_state(box_head, detector.roi_heads.box_head)


def test_initialize_relation_branch_other_box_head_raises(tmp_path, detector):
    model = small_model("MODEL.ROI_RELATION_HEAD.POOLER_RESOLUTION", 5)
    with pytest.raises(ValueError, match=r"(?s)do not fit a relation box head.*fc1"):
        RelDNCheckpointer(model).load(write(detector, tmp_path, "pth"))
    with pytest.raises(ValueError, match="do not fit a relation box head"):
        initialize_relation_branch(model)


def test_load_reldn_checkpoint_restores_everything(tmp_path):
    model = small_model(seed=1)
    give_distinct_statistics(model.predicate_backbone)
    model.relation_head.semantic.set_log_frequencies(torch.randn(9, 9, 7))
    cfg = small_config("SEED", 77)
    RelDNCheckpointer(
        model, str(tmp_path), thing_classes=CLASSES, predicate_classes=PREDICATES, cfg=cfg
    ).save("reldn", iteration=11)
    other = small_model(seed=2)
    extra = RelDNCheckpointer(other).load(str(tmp_path / "reldn.pth"))
    assert_equal_state(other, model)
    assert bool(other.relation_head.semantic.counted) and extra["iteration"] == 11

    content = torch.load(tmp_path / "reldn.pth", weights_only=True)
    assert content["reldn"]["thing_classes"] == CLASSES
    assert content["reldn"]["predicate_classes"] == PREDICATES
    again = get_cfg()
    reldn_d2.add_reldn_config(again)
    again.merge_from_other_cfg(type(again).load_cfg(content["reldn"]["config"]))
    assert again.SEED == 77 and again.MODEL.META_ARCHITECTURE == "RelDN"


def test_load_reldn_checkpoint_module_prefix_restores_everything(tmp_path):
    model = small_model(seed=1)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "reldn.pth")
    other = small_model(seed=2)
    RelDNCheckpointer(other).load(str(tmp_path / "reldn.pth"))
    assert_equal_state(other, model)


def options(folder, *more):
    return (
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,)),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 1),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 96, "SEED", 1, *more),
    )


def test_trainer_resume_continues_where_it_stopped(tmp_path, dataset, detector, caplog):
    """The resumed run neither copies the detector nor counts the frequency table again."""
    weights = ("MODEL.WEIGHTS", write(detector, tmp_path, "pth"))
    folder = tmp_path / "run"
    folder.mkdir()
    first = RelDNTrainer(small_config(*options(folder, *weights)))
    first.resume_or_load(resume=False)
    assert first.start_iter == 0
    assert_equal_state(first.model.predicate_backbone, detector.backbone)
    assert bool(first.model.relation_head.semantic.counted)
    first.train()
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert content["reldn"]["predicate_classes"] == PREDICATES
    assert "SOLVER" in content["reldn"]["config"]

    longer = small_config(*options(folder, *weights, "SOLVER.MAX_ITER", 5))
    second = RelDNTrainer(longer)
    second.resume_or_load(resume=True)
    assert second.start_iter == 3
    assert_equal_state(second.model, first.model)
    with pytest.raises(AssertionError):
        assert_equal_state(second.model.predicate_backbone, detector.backbone)
    momentum = [s for s in second._trainer.optimizer.state.values() if s]
    assert len(momentum) == len([p for p in second.model.parameters() if p.requires_grad])
    second.train()
    assert second.iter == 5
    assert_equal_state(second.model.detector.model, detector)

    # Detectron2 v0.6 saves no optimizer state.
    state = {name: value for name, value in second.state_dict().items() if name != "_trainer"}
    with caplog.at_level("WARNING", logger="reldn_d2.engine.defaults"):
        second.load_state_dict(state)
    assert "no optimizer state" in caplog.text

    # Without --resume the same folder starts from the detector again.
    third = RelDNTrainer(longer)
    third.resume_or_load(resume=False)
    assert third.start_iter == 0
    assert_equal_state(third.model.predicate_backbone, detector.backbone)


def test_ensure_frequency_table_counts_once(tmp_path, dataset, monkeypatch):
    cfg, model = small_config(*options(tmp_path)), small_model()
    ensure_frequency_table(cfg, model)
    table = model.relation_head.semantic.table.weight.detach().clone()
    assert table.unique(dim=0).shape[0] > 1
    monkeypatch.setattr(SemanticModule, "set_log_frequencies", None)  # would raise if called
    ensure_frequency_table(cfg, model)
    ensure_frequency_table(cfg, small_model("MODEL.ROI_RELATION_HEAD.SEMANTIC.ENABLED", False))
    ensure_frequency_table(cfg, small_model(config=DETECTOR))
    assert torch.equal(model.relation_head.semantic.table.weight, table)


def test_ensure_frequency_table_counts_on_the_named_data_sets(tmp_path, dataset):
    """The checkpoint still describes the training set."""
    larger, key = "a_larger_set", "MODEL.ROI_RELATION_HEAD.SEMANTIC.COUNT_DATASETS"
    register_dataset(larger, tmp_path / "more", count=9)
    try:
        own, other = small_model(), small_model()
        ensure_frequency_table(small_config(*options(tmp_path)), own)
        cfg = small_config(*options(tmp_path), key, (larger,))
        statistics = ensure_frequency_table(cfg, other)
        assert statistics.num_images == 4
        wanted = small_model()
        ensure_frequency_table(
            small_config(*options(tmp_path), "DATASETS.TRAIN", (larger,)), wanted
        )
        table = other.relation_head.semantic.table.weight
        assert torch.equal(table, wanted.relation_head.semantic.table.weight)
        assert not torch.equal(table, own.relation_head.semantic.table.weight)
        MetadataCatalog.get(larger).__dict__["predicate_classes"] = [*PREDICATES[:-1], "near"]
        with pytest.raises(ValueError, match=f"predicate_classes.*COUNT_DATASETS is {larger}"):
            ensure_frequency_table(cfg, small_model())
        with pytest.raises(ValueError, match=r"NUM_PREDICATES is 6, but the dataset 'a_larger_set"):
            MetadataCatalog.get(larger).__dict__["predicate_classes"] = PREDICATES[:5]
            check_counts(cfg, small_model())
    finally:
        unregister_dataset(larger)


@pytest.mark.parametrize("semantic", [True, False])
def test_load_other_predicate_count_raises_with_both_counts(tmp_path, semantic):
    switch = ("MODEL.ROI_RELATION_HEAD.SEMANTIC.ENABLED", semantic)
    RelDNCheckpointer(small_model(*switch), str(tmp_path)).save("reldn")
    model = small_model("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 11, *switch)
    message = "trained with 6 predicates, the config has 11 .MODEL.ROI_RELATION_HEAD.NUM_PREDICATES"
    with pytest.raises(ValueError, match=rf"reldn\.pth.*{message}") as error:
        RelDNCheckpointer(model).load(str(tmp_path / "reldn.pth"))
    assert "entity classes" not in str(error.value)


@pytest.mark.parametrize("kind", ["detector", "reldn"])
def test_load_other_class_count_raises_with_both_counts(tmp_path, detector, kind):
    if kind == "detector":
        path = write(detector, tmp_path, "pth")
    else:
        RelDNCheckpointer(small_model(), str(tmp_path)).save("reldn")
        path = str(tmp_path / "reldn.pth")
    model = small_model("MODEL.ROI_HEADS.NUM_CLASSES", 57)
    message = "trained with 9 entity classes, the config has 57 .MODEL.ROI_HEADS.NUM_CLASSES"
    with pytest.raises(ValueError, match=rf"{kind}\.pth.*{message}") as error:
        RelDNCheckpointer(model).load(path)
    assert "predicates, the config" not in str(error.value)


def test_load_other_class_count_in_the_table_raises_with_both_counts(tmp_path):
    kind = ("MODEL.RELDN.DETECTOR", "PrecomputedDetector")
    RelDNCheckpointer(small_model(*kind), str(tmp_path)).save("reldn")
    model = small_model(*kind, "MODEL.ROI_HEADS.NUM_CLASSES", 57)
    with pytest.raises(ValueError, match="trained with 9 entity classes, the config has 57"):
        RelDNCheckpointer(model).load(str(tmp_path / "reldn.pth"))


def test_load_other_kind_of_detector_raises(tmp_path):
    retinanet = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.DEVICE", "cpu")
    config = "configs/Toy/Detectors/retinanet_FPN.yaml"
    DetectorCheckpointer(small_model(*retinanet, config=config), str(tmp_path)).save("detector")
    with pytest.raises(ValueError, match=r"another kind.* head\..*MODEL\.RELDN\.DETECTOR"):
        RelDNCheckpointer(small_model()).load(str(tmp_path / "detector.pth"))


@pytest.mark.parametrize("zoo", [True, False])
def test_load_backbone_only_raises(tmp_path, detector, zoo):
    backbone = {
        name: value.numpy() for name, value in detector.backbone.bottom_up.state_dict().items()
    }
    if zoo:  # ImageNet weights of the model zoo: matched by name
        content = {"model": backbone, "__author__": "x", "matching_heuristics": True}
    else:
        content = {"model": {f"backbone.bottom_up.{n}": v for n, v in backbone.items()}}
        content["__author__"] = "x"
    with open(tmp_path / "R-5.pkl", "wb") as file:
        pickle.dump(content, file)
    with pytest.raises(ValueError, match=r"R-5\.pkl lacks \d+ weights.*backbone only: train the"):
        RelDNCheckpointer(small_model()).load(str(tmp_path / "R-5.pkl"))


def test_load_reldn_checkpoint_missing_module_raises(tmp_path):
    RelDNCheckpointer(
        small_model("MODEL.ROI_RELATION_HEAD.SPATIAL.ENABLED", False), str(tmp_path)
    ).save("reldn")
    with pytest.raises(ValueError, match=r"lacks 6 weights.*relation_head\.spatial"):
        RelDNCheckpointer(small_model()).load(str(tmp_path / "reldn.pth"))


def test_load_missing_file_raises():
    with pytest.raises(FileNotFoundError, match=r"No checkpoint 'no/such\.pth' .MODEL.WEIGHTS"):
        RelDNCheckpointer(small_model()).load("no/such.pth")


def test_load_url_without_network_raises():
    class NoNetwork(PathHandler):
        def _get_supported_prefixes(self):
            return ["nonetwork://"]

        def _get_local_path(self, path, **kwargs):
            raise URLError("Name or service not known")

    PathManager.register_handler(NoNetwork(), allow_override=True)
    message = r"'nonetwork://a\.pkl' .MODEL.WEIGHTS. could not be fetched: .*not known.*local file"
    with pytest.raises(FileNotFoundError, match=message):
        RelDNCheckpointer(small_model()).load("nonetwork://a.pkl")


def test_load_url_uses_detectron2s_path_manager(tmp_path, detector, caplog):
    """So that detectron2:// and catalog:// work."""

    class Zoo(PathHandler):
        def _get_supported_prefixes(self):
            return ["testzoo://"]

        def _get_local_path(self, path, **kwargs):
            return str(tmp_path / path[len("testzoo://") :])

    write(detector, tmp_path, "pkl")
    PathManager.register_handler(Zoo(), allow_override=True)
    model = small_model()
    with caplog.at_level("INFO", logger="reldn_d2.checkpoint"):
        RelDNCheckpointer(model).load("testzoo://detector.pkl")
    assert_equal_state(model.detector.model, detector)
    (line,) = (x.getMessage() for x in caplog.records if "Loaded" in x.getMessage())
    count = len([x for x in detector.state_dict() if "num_batches" not in x])
    assert f"Loaded {count} weights of the detector checkpoint testzoo://detector.pkl" in line
    assert "into backbone" in line and "into roi_heads.box_head" in line


def test_load_empty_path_warns(caplog):
    RelDNCheckpointer(small_model()).load("")
    assert "MODEL.WEIGHTS is empty: the frozen detector has random weights" in caplog.text


def test_load_unexpected_weights_logs_their_count(tmp_path, detector, caplog):
    """For example a Mask R-CNN checkpoint for a detector without masks."""
    state = {**detector.state_dict(), "roi_heads.mask_head.mask_fcn1.weight": torch.zeros(2, 2)}
    torch.save({"model": state}, tmp_path / "mask.pth")
    model = small_model()
    with caplog.at_level("INFO", logger="reldn_d2.checkpoint"):
        RelDNCheckpointer(model).load(str(tmp_path / "mask.pth"))
    assert_equal_state(model.detector.model, detector)
    assert "ignored 1 unexpected weights" in caplog.text


def test_build_checkpointer_depends_on_the_model(tmp_path, dataset):
    cfg = small_config(*options(tmp_path))
    ours = build_checkpointer(cfg, small_model())
    assert isinstance(ours, RelDNCheckpointer)
    assert ours.description["thing_classes"] == CLASSES
    theirs = build_checkpointer(cfg, small_model(config=DETECTOR))
    assert type(theirs) is DetectorCheckpointer and theirs.save_dir == str(tmp_path)


def test_distributed_training_any_batch_steps_and_saves(tmp_path, detector):
    """DDP raises if a parameter was not part of the loss of the previous step."""
    path = write(detector, tmp_path, "pth")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(small_model().train())
        checkpointer = RelDNCheckpointer(model, str(tmp_path))
        checkpointer.load(path)
        assert_equal_state(model.module.predicate_backbone, detector.backbone)
        for batch in ([empty_item()], [unrelated_item(), one_box_item()], [busy_item()]):
            model.zero_grad()
            with EventStorage():
                sum(model(batch).values()).backward()
        checkpointer.save("reldn")
    finally:
        torch.distributed.destroy_process_group()
    other = small_model(seed=9)
    RelDNCheckpointer(other).load(str(tmp_path / "reldn.pth"))
    assert_equal_state(other, model.module)
