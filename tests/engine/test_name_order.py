"""Runs whose datasets or checkpoints list classes and predicates in another order."""

from types import SimpleNamespace

import pytest
import torch
from model_utils import (
    CLASSES,
    PREDICATES,
    register_dataset,
    register_permuted_dataset,
    small_config,
    unregister_dataset,
)

from reldn_d2.data.build import load_training_dicts
from reldn_d2.engine import RelDNTrainer
from reldn_d2.structures.name_matching import NameMismatchError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances

STRAIGHT, PERMUTED = "names_straight", "names_permuted"
DETECTOR = "configs/Toy/detector.yaml"


@pytest.fixture(autouse=True)
def datasets(tmp_path):
    register_dataset(STRAIGHT, tmp_path / "images")
    register_permuted_dataset(PERMUTED, STRAIGHT)
    yield
    unregister_dataset(STRAIGHT)
    unregister_dataset(PERMUTED)


def config(folder, *more, config="configs/Toy/reldn.yaml"):
    return small_config(
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", (STRAIGHT,), "DATASETS.TEST", ()),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 96, "SEED", 1),
        *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, *more),
        config=config,
    )


class Interrupt(HookBase):
    def before_step(self):
        if self.trainer.iter == 2:
            raise KeyboardInterrupt


class AnnotatedBoxes(torch.nn.Module):
    """A detector that finds all annotated boxes, but takes the second cup for a hat."""

    names = {"thing_classes": CLASSES}

    def __init__(self, dicts):
        super().__init__()
        self.annotations = {x["image_id"]: x["annotations"] for x in dicts}

    def forward(self, batched_inputs):
        return [{"instances": self.detect(x)} for x in batched_inputs]

    def detect(self, image):
        found = self.annotations[image["image_id"]]
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(torch.tensor([x["bbox"] for x in found]).reshape(-1, 4))
        classes = [x["category_id"] for x in found]
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        instances.pred_classes[2:3] = CLASSES.index("hat")
        instances.scores = torch.full((len(found),), 0.9)
        return instances


def train(cfg, resume=False, hooks=()):
    torch.manual_seed(5)
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


JOINT = ("MODEL.ROI_RELATION_HEAD.JOINT.ENABLED", True)


def assert_equal_results(found, wanted):
    assert found.keys() == wanted.keys()
    for task, metrics in wanted.items():
        assert found[task].keys() == metrics.keys()
        for name, value in metrics.items():
            assert found[task][name] == pytest.approx(value, nan_ok=True), (task, name)


@pytest.mark.parametrize(
    ("task", "modules"), [("sgdet", ()), ("sgcls", ()), ("prdcls", ()), ("prdcls", JOINT)]
)
def test_evaluation_on_permuted_names_gives_the_same_metrics(tmp_path, task, modules, caplog):
    both = ("DATASETS.TEST", (STRAIGHT, PERMUTED), "TEST.RELATIONS.TASK", task, *modules)
    with caplog.at_level("INFO", logger="reldn_d2"):
        results = train(config(tmp_path / "run", *both))._last_eval_results
    assert f"dataset '{PERMUTED}' lists the 6 names of the model in another order" in caplog.text
    (wanted,) = (x for name, x in results[STRAIGHT].items() if name.startswith("relations_"))
    assert wanted["R@50"] > (0 if task == "prdcls" else -1)
    assert_equal_results(results[PERMUTED], results[STRAIGHT])
    # --eval-only knows the order of the model from its checkpoint alone, whatever TRAIN says.
    weights = ("MODEL.WEIGHTS", str(tmp_path / "run/model_final.pth"))
    for trained in ((), (PERMUTED,), (STRAIGHT,)):
        cfg = config(tmp_path / "again", *both, *weights, "DATASETS.TRAIN", trained)
        again = RelDNTrainer.evaluate_checkpoint(cfg)
        for name in (STRAIGHT, PERMUTED):
            assert_equal_results(again[name], results[STRAIGHT])


def test_detector_evaluation_on_permuted_names_gives_the_same_metrics(tmp_path):
    cfg = config(tmp_path, "DATASETS.TEST", (STRAIGHT, PERMUTED), config=DETECTOR)
    model = AnnotatedBoxes(DatasetCatalog.get(STRAIGHT))
    results = RelDNTrainer.test(cfg, model)
    ap = results[STRAIGHT]["bbox"]
    assert ap["AP-person"] == pytest.approx(100)
    assert 0 < ap["AP-cup"] < 100
    assert_equal_results(results[PERMUTED], results[STRAIGHT])


def test_training_sets_in_two_orders_are_mapped_to_the_first(tmp_path):
    cfg = config(tmp_path, "DATASETS.TRAIN", (PERMUTED, STRAIGHT))
    dicts = load_training_dicts(cfg, len(CLASSES), len(PREDICATES))
    first, second = dicts[: len(dicts) // 2], dicts[len(dicts) // 2 :]
    assert first == second and len(first) == 3
    assert [x["category_id"] for x in DatasetCatalog.get(STRAIGHT)[0]["annotations"]] == [
        8 - x["category_id"] for x in first[0]["annotations"]
    ]
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    twice = trainer.model.relation_head.semantic.table.weight
    once = RelDNTrainer(config(tmp_path, "DATASETS.TRAIN", (PERMUTED,)))
    once.resume_or_load(resume=False)
    assert (
        twice.argmax(dim=1).tolist()
        == once.model.relation_head.semantic.table.weight.argmax(dim=1).tolist()
    )


@pytest.mark.parametrize("modules", [(), JOINT])
def test_resume_on_permuted_names_equals_an_uninterrupted_run(tmp_path, modules, caplog):
    more = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, *modules)
    whole = train(config(tmp_path / "whole", *more))
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "cut", *more), hooks=[Interrupt()])
    cfg = config(tmp_path / "cut", *more, "DATASETS.TRAIN", (PERMUTED,))
    with caplog.at_level("INFO", logger="reldn_d2"):
        resumed = train(cfg, resume=True)
    assert f"dataset '{PERMUTED}' lists the 9 names of the model" in caplog.text
    assert resumed.start_iter == 2
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)
    content = torch.load(tmp_path / "cut/model_final.pth", weights_only=True)
    assert content["reldn"]["thing_classes"] == CLASSES


def test_detector_checkpoint_carries_names_and_reldn_maps_them(tmp_path):
    train(config(tmp_path / "detector", config=DETECTOR))
    path = str(tmp_path / "detector/model_final.pth")
    assert torch.load(path, weights_only=True)["detector"]["thing_classes"] == CLASSES
    models = []
    for name in (STRAIGHT, PERMUTED):
        cfg = config(tmp_path / name, "MODEL.WEIGHTS", path, "DATASETS.TRAIN", (name,))
        trainer = RelDNTrainer(cfg)
        trainer.resume_or_load(resume=False)
        models.append(trainer.model)
    one, other = (x.detector.model.roi_heads.box_predictor.cls_score.weight for x in models)
    assert torch.equal(one[[*range(8, -1, -1), 9]], other) and not torch.equal(one, other)
    assert models[1].names["thing_classes"] == CLASSES[::-1]


def test_trainer_test_set_with_other_names_raises_before_training(tmp_path):
    MetadataCatalog.get(PERMUTED).predicate_classes[0] = "inside"
    trainer = RelDNTrainer(config(tmp_path, "DATASETS.TEST", (PERMUTED,)))
    with pytest.raises(NameMismatchError) as error:
        trainer.resume_or_load(resume=False)
    assert f"Only in dataset '{PERMUTED}': 'inside' (1 of 6)" in str(error.value)
    assert "Only in the model: 'inside of' (1 of 6)" in str(error.value)


def test_trainer_class_twice_raises(tmp_path):
    MetadataCatalog.get(PERMUTED).thing_classes[0] = "person "
    with pytest.raises(ValueError, match='classes 0 and 8 are both "person"'):
        RelDNTrainer(config(tmp_path, "DATASETS.TRAIN", (PERMUTED,)))


def test_custom_loader_with_permuted_names_raises(tmp_path):
    train(config(tmp_path / "run"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "run/model_final.pth"))
    trainer = RelDNTrainer(config(tmp_path / "next", *weights, "DATASETS.TRAIN", (PERMUTED,)))
    trainer._trainer.data_loader = iter([])
    with pytest.raises(ValueError, match="this data loader cannot map them"):
        trainer.resume_or_load(resume=False)


def test_trainer_maps_the_attributes_of_the_first_dataset_that_has_any(tmp_path):
    """The first training set may have none; its classes still decide those of the others."""
    MetadataCatalog.get(PERMUTED).attribute_classes = ["red", "old"]
    cfg = config(tmp_path, "DATASETS.TRAIN", (STRAIGHT, PERMUTED), "DATASETS.TEST", (PERMUTED,))
    names = {"thing_classes": CLASSES, "attribute_classes": ["old", "red"]}
    loader = SimpleNamespace(renumbering=None)
    trainer = SimpleNamespace(cfg=cfg, model=SimpleNamespace(names=names), data_loader=loader)
    RelDNTrainer._map_names(trainer)
    assert loader.renumbering.attributes == [1, 0] and loader.renumbering.classes is None
