"""RelDN on four real images of VRD, through loader, mapper, trainer and evaluator."""

import math

import pytest
from model_utils import small_config

from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES, load_vrd
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.data import DatasetCatalog, MetadataCatalog

NAME = "four_real_images_of_vrd"
ITERATIONS = 30


@pytest.fixture
def four_images(real_datasets):
    folder = real_datasets / "vrd"
    dicts = load_vrd(
        str(folder / "json_dataset/annotations_train.json"),
        str(folder / "sg_dataset/sg_train_images"),
    )
    dicts = [x for x in dicts if len(x["relations"]) >= 3][:4]
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).set(
        thing_classes=list(VRD_CLASSES),
        predicate_classes=list(VRD_PREDICATES),
        evaluator_type="vrd",
    )
    yield dicts
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_losses_fall_when_four_images_are_over_fitted(four_images, tmp_path):
    """The detector is random, the entities are the ground truth: the relation branch must learn."""
    cfg = small_config(
        *("OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,)),
        *("MODEL.RELDN.TRAIN_ENTITIES", "ground_truth", "TEST.RELATIONS.TASK", "prdcls"),
        *("MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", False),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "SOLVER.IMS_PER_BATCH", 4, "SEED", 1),
        *("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.WARMUP_ITERS", 5, "SOLVER.BASE_LR", 0.003),
        config="configs/VRD/reldn_small.yaml",
    )
    assert len(four_images) == 4
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    history = trainer.storage.histories()
    for name in ("total_loss", "loss_predicate", "loss_class_agnostic"):
        values = [value for value, _ in history[name].values()]
        assert len(values) == ITERATIONS and all(math.isfinite(x) for x in values)
        first, last = sum(values[:5]) / 5, sum(values[-5:]) / 5
        assert last < 0.6 * first, name
    # What was learnt by heart is also what is predicted, in the evaluator's frame and numbering.
    recalled = trainer._last_eval_results["lu2016_prdcls_k10"]["predicate R@50"]
    assert 85 < recalled <= 100
