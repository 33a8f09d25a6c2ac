"""Training, evaluation and prediction with boxes alone: no image is opened, none need exist."""

import json
import logging
import shutil
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from data_files import write_json
from model_utils import CLASSES, PREDICATES
from PIL import Image
from sandbox import BOXES, Runner, enter_checkout, merged, write_checkout, write_detections

import reldn_d2.data.dataset_mapper as dataset_mapper
import reldn_d2.utils.image_io as image_io
from reldn_d2.checkpoint.reldn_checkpoint import RelDNCheckpointer
from reldn_d2.config import reads_pixels
from reldn_d2.data.boxes_only import add_sizes, load_without_images
from reldn_d2.data.check import main as check_main
from reldn_d2.engine.defaults import RelDNTrainer
from reldn_d2.engine.run_check import check_run
from reldn_d2.modeling.meta_arch import needs_images
from reldn_d2.modeling.relation_head.pair_sampling import training_pairs
from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.image_io import ImageError
from reldn_d2.vis.saliency import feature_saliency, triplet_saliency

from detectron2.data import detection_utils
from detectron2.utils.events import EventStorage

LEAVES = [f"configs/{name}/reldn_boxes.yaml" for name in ("VRD", "VG", "OpenImages")]
IMAGE_FOLDERS = ("vrd/sg_dataset", "vg/VG_100K", "openimages_vrd/train")
# A counted table: a module after two iterations may find nothing.
TABLE = ("MODEL.ROI_RELATION_HEAD.SEMANTIC.ENABLED", True)
SGDET = ("TEST.RELATIONS.TASK", "sgdet")


def refuse(*args, **kwargs):
    raise AssertionError("an image was opened")


@pytest.fixture
def no_images(tmp_path, monkeypatch):
    """A checkout whose datasets have no images, in a process that cannot open any."""
    folder = write_checkout(tmp_path / "checkout")
    for images in IMAGE_FOLDERS:
        shutil.rmtree(folder / "datasets" / images)
    enter_checkout(folder, monkeypatch)
    for module, name in ((Image, "open"), (cv2, "imread"), (detection_utils, "read_image")):
        monkeypatch.setattr(module, name, refuse)
    for module in (image_io, dataset_mapper):
        monkeypatch.setattr(module, "read_image", refuse)
    return folder


@pytest.mark.parametrize("yaml", LEAVES)
def test_train_net_runs_without_images(yaml, no_images):
    """Training, checkpoint, --eval-only and --resume in PRDCLS; then SGDET on detections."""
    run = Runner(no_images)
    cfg = merged(yaml)
    run(yaml, *TABLE)
    folder = no_images / cfg.OUTPUT_DIR
    trained = json.loads((folder / "results_prdcls.json").read_text())
    own = (*TABLE, "MODEL.WEIGHTS", str(folder / "model_final.pth"))
    assert run(yaml, *own, flags=["--eval-only"]).keys() == trained.keys()
    assert json.loads((folder / "results_prdcls.json").read_text()) == trained
    run(yaml, *TABLE, "SOLVER.MAX_ITER", 3, flags=["--resume"])
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert content["iteration"] == 2
    assert not any(name.startswith("detector.") for name in content["model"])

    (name,) = cfg.DATASETS.TEST
    records = add_sizes(name, load_without_images(name))
    file = write_detections(no_images / "detections.json", records)
    options = (*own, *SGDET, "DATASETS.DETECTION_FILES_TEST", str((str(file),)))
    if "OpenImages" in yaml:  # boxes are annotated as fractions of images of unknown size
        with pytest.raises(ValueError, match="annotated as fractions of the image, whose size is"):
            run(yaml, *options, flags=["--eval-only"])
        return
    results = run(yaml, *options, flags=["--eval-only"])
    recalls = [value for block in results.values() for x, value in block.items() if "R@" in x]
    assert max(recalls) > 0, "detections are the annotated boxes"


def test_train_net_resumed_without_images_equals_uninterrupted(no_images):
    run = Runner(no_images)
    weights = []
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for steps_until in steps:
            options = ("OUTPUT_DIR", f"output/{name}", "SOLVER.MAX_ITER", steps_until)
            flags = ["--resume"] if steps_until != steps[0] else []
            # A constant rate: the schedule depends on MAX_ITER.
            rate = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 0)
            run(LEAVES[0], *options, *rate, "DATASETS.TEST", "()", flags=flags)
        content = torch.load(no_images / f"output/{name}/model_final.pth", weights_only=True)
        weights.append(content["model"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_model_without_pixels_has_no_detector_weights():
    cfg = merged(LEAVES[0])
    assert not reads_pixels(cfg) and not needs_images(cfg)
    model = RelDNTrainer.build_model(cfg)
    assert model.detector.state_dict() == {} and model.predicate_backbone is None
    assert not model.detector.reads_images and model.device.type == "cpu"
    with_skip = merged(LEAVES[0], "MODEL.ROI_RELATION_HEAD.VISUAL.SUBJECT_SKIP", True)
    assert needs_images(with_skip)
    # A detector's boxes need the image, whatever the head reads.
    assert needs_images(merged(LEAVES[0], "MODEL.RELDN.DETECTOR", "auto"))
    assert needs_images(merged(LEAVES[0], "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))


@pytest.mark.parametrize("task", ["sgdet", "sgcls"])
def test_check_run_detections_missing_raises(task, no_images):
    cfg = merged(LEAVES[0], "TEST.RELATIONS.TASK", task)
    message = f"TEST.RELATIONS.TASK is '{task}', which needs detections.*DETECTION_FILES_TEST is em"
    with pytest.raises(ValueError, match=message):
        check_run(cfg, eval_only=True)
    with pytest.raises(ValueError, match=message):
        RelDNTrainer(cfg)


def test_check_run_proposals_without_detections_raises(no_images, caplog):
    proposals = ("MODEL.RELDN.TRAIN_ENTITIES", "proposals")
    cfg = merged(LEAVES[0], *proposals)
    with pytest.raises(ValueError, match="TRAIN_ENTITIES is 'proposals', which.*FILES_TRAIN is em"):
        check_run(cfg)
    check_run(cfg, eval_only=True)
    # With images, a data loader of the user's own may add detections.
    shutil.copytree(no_images / "datasets/vrd/json_dataset", no_images / "datasets/vrd/sg_dataset")
    for split in ("train", "test"):
        (no_images / f"datasets/vrd/sg_dataset/sg_{split}_images").mkdir()
    visual = ("MODEL.ROI_RELATION_HEAD.VISUAL.SPO", True)
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        check_run(merged(LEAVES[0], *proposals, *visual))
    assert "unless your own data loader adds detections" in caplog.text


def test_config_that_reads_pixels_without_images_raises(no_images):
    with pytest.raises(ValueError, match="there is no .*sg_train_images; download the dataset"):
        check_run(merged("configs/VRD/reldn_small.yaml", "MODEL.WEIGHTS", ""))


def test_load_detector_checkpoint_without_pixels_raises(tmp_path):
    model = RelDNTrainer.build_model(merged(LEAVES[0]))
    torch.save({"model": {"backbone.conv.weight": torch.zeros(3)}}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match='detector.pth .* Set MODEL.WEIGHTS to "" or to a RelDN'):
        RelDNCheckpointer(model).load(str(tmp_path / "detector.pth"))


def test_load_nothing_without_pixels_does_not_warn(caplog):
    model = RelDNTrainer.build_model(merged(LEAVES[0]))
    with caplog.at_level(logging.WARNING):
        RelDNCheckpointer(model).load("")
    assert "random weights" not in caplog.text


def test_checkpoint_with_unused_backbone_loads_without_it(tmp_path):
    """As written when a model without visual module still had a backbone."""
    model = RelDNTrainer.build_model(merged(LEAVES[1]))
    state = {**model.state_dict(), "detector.model.backbone.conv.weight": torch.zeros(3)}
    state["relation_head.spatial.0.bias"] = torch.full_like(
        state["relation_head.spatial.0.bias"], 7
    )
    torch.save({"model": state}, tmp_path / "old.pth")
    RelDNCheckpointer(model).load(str(tmp_path / "old.pth"))
    assert (model.relation_head.spatial[0].bias == 7).all()


@pytest.mark.parametrize("name", ["vrd_train", "visual_genome_test", "openimages_vrd_mini_val"])
def test_check_without_images_says_what_needs_them(name, no_images, capsys):
    assert check_main([name]) == 0
    printed = capsys.readouterr().out
    assert "note: there are no images in " in printed
    assert "Detectors and models with a visual module need the images" in printed
    assert f"{name} is usable without images: 0 errors" in printed


def test_check_some_images_missing_is_an_error(no_images, capsys):
    folder = no_images / "datasets/vrd/sg_dataset/sg_train_images"
    folder.mkdir(parents=True)
    (folder / "train_1.jpg").write_bytes(b"")
    assert check_main(["vrd_train"]) == 1
    assert "image train_0.jpg is annotated but not in" in capsys.readouterr().out


def test_sizes_come_from_the_cache_then_from_the_boxes(no_images, caplog):
    cache = no_images / "datasets/vrd/sg_dataset/reldn_cache"
    cache.mkdir(parents=True)
    sizes = {"train_0.jpg": [1, 2, 500, 600], "train_1.png": [1, 2, 300, 400]}  # another suffix
    write_json(cache / "sg_train_images.sizes.json", {"version": 1, "sizes": sizes})
    with caplog.at_level(logging.INFO, "reldn_d2"):
        dicts = add_sizes("vrd_train", load_without_images("vrd_train"))
    spanned = (max(box[3] for box in BOXES), max(box[2] for box in BOXES))
    expected = [(500, 600), (300, 400), spanned, spanned]
    assert [(x["height"], x["width"]) for x in dicts] == expected
    assert caplog.text.count("the sizes of 2 of 4 images are neither annotated nor cached") == 1


def test_sizes_include_detections_and_are_at_least_one_pixel():
    detections = {"boxes": np.array([[0, 0, 70.2, 9]], np.float32)}
    box = {"bbox": [0, 0, 30, 40.5], "bbox_mode": 0, "category_id": 0}
    dicts = [{"annotations": [box], "detections": detections}, {"annotations": []}]
    assert [(x["height"], x["width"]) for x in add_sizes("x", dicts)] == [(41, 71), (1, 1)]
    assert "height" not in dicts[0]


def test_images_are_mapped_once_and_their_pairs_kept(no_images):
    cfg = merged(LEAVES[0], "SOLVER.IMS_PER_BATCH", 4, "SEED", 1)
    loader = RelDNTrainer.build_train_loader(cfg)
    first, second = islice(loader, 2)
    by_id = {x["image_id"]: x for x in first}
    assert all(x["instances"] is by_id[x["image_id"]]["instances"] for x in second)
    model = RelDNTrainer.build_model(cfg)
    with EventStorage():
        model(first)
        kept = {x["image_id"]: x["derived"]["entities"][0]._derived["pairs"] for x in first}
        model(second)
    assert all(x["derived"]["entities"][0]._derived["pairs"] is kept[x["image_id"]] for x in second)


def pairs_of(model, entities, target):
    head = model.relation_head
    options = dict(num_predicates=head.num_predicates, sampler=head.sampler)
    return training_pairs(entities, *target, **options)


def test_kept_pairs_equal_new_ones(no_images):
    model = RelDNTrainer.build_model(merged(LEAVES[0]))
    batch = next(iter(RelDNTrainer.build_train_loader(merged(LEAVES[0], "SEED", 1))))[:4]
    with EventStorage():
        model(batch)
    entities, targets = model._training_entities(batch, None, {})
    for x, own, target in zip(batch, entities, targets):
        kept = x["derived"]["entities"][0]._derived["pairs"]
        new = pairs_of(model, own, target)
        assert all(torch.equal(value, vars(new)[key]) for key, value in vars(kept).items())


def test_pairs_are_drawn_again_if_there_is_a_choice(no_images):
    fewer = ("MODEL.ROI_RELATION_HEAD.SAMPLING.PAIRS", 4)  # of six
    model = RelDNTrainer.build_model(merged(LEAVES[0], *fewer))
    batch = next(iter(RelDNTrainer.build_train_loader(merged(LEAVES[0], "SEED", 1))))[:1]
    (kept,), (target,) = model._repeated_entities(batch)
    drawn = [pairs_of(model, kept, target) for _ in range(20)]
    assert {len(x) for x in drawn} == {4} and list(kept._derived) == ["grid"]
    assert len({tuple(x.subjects.tolist() + x.objects.tolist()) for x in drawn}) > 1


# --------------------------------------------------------------------------------------- prediction


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    torch.manual_seed(0)
    counts = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))
    counts += ("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", len(PREDICATES))
    cfg = merged(LEAVES[1], *counts, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()")
    model = RelDNTrainer.build_model(cfg)
    torch.nn.init.normal_(model.relation_head.semantic.table.weight)
    folder = tmp_path_factory.mktemp("boxes")
    names = dict(thing_classes=CLASSES, predicate_classes=PREDICATES, cfg=cfg)
    RelDNCheckpointer(model, str(folder), **names).save("model_final")
    return RelationPredictor.from_checkpoint(folder / "model_final.pth", device="cpu")


def assert_same(found, expected):
    assert len(found.pairs) > 0
    for name in ("boxes", "classes", "box_scores", "pairs", "predicates", "scores"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


GIVEN = dict(boxes=BOXES, classes=["cup", 0, "table"], scores=[0.9, 0.5, 1.0])
DETECTED = dict(detections=GIVEN)


@pytest.mark.parametrize("given", [GIVEN, DETECTED])
def test_predictor_without_image_equals_image_of_that_size(predictor, given, monkeypatch):
    height, width = 64, 96
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    expected = predictor(image, **given)
    assert_same(predictor(size=(height, width), **given), expected)
    assert_same(predictor(255 - image, **given), expected)
    lists = {key: [value, value] for key, value in given.items()}
    sizes = [(height, width), None]
    first, second = predictor([None, None], size=sizes, batch_size=2, **lists)
    assert_same(first, expected)
    assert_same(second, predictor(**given))
    # The size that the boxes span is the default.
    assert_same(second, predictor(size=(62, 92), **given))


def test_predictor_without_image_keeps_scores_and_names(predictor):
    graph = predictor(**GIVEN)
    assert graph.boxes.tolist() == BOXES and graph.box_scores.tolist() == pytest.approx(
        [0.9, 0.5, 1]
    )
    subject, object_ = graph.pairs[0]
    pair_score = graph.box_scores[subject] * graph.box_scores[object_]
    assert graph.scores[0] == pytest.approx(pair_score * graph.predicate_scores[0])
    assert graph.triplets()[0].predicate in PREDICATES
    assert not predictor.reads_images
    assert len(predictor(boxes=[], classes=[]).pairs) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "image: .* give detections, or boxes with classes"),
        ({"boxes": BOXES}, "image: classes are missing: this model has no detector"),
        ({**GIVEN, "size": (60, 0)}, "image: size is .60, 0.; expected height and width"),
        ({**GIVEN, "size": 60}, "image: size is 60; expected height and width in pixels"),
        ({**GIVEN, "size": "60"}, "image: size is '60'; expected height and width in pixels"),
        ({**GIVEN, "size": (float("inf"), 9)}, "size is .inf, 9.; expected height and width"),
        ({**GIVEN, "size": (2**25, 9)}, "expected height and width in pixels, at most 16777216"),
        (
            {**GIVEN, "boxes": [[0, 0, 1e30, 9], *BOXES[1:]]},
            "box 0, .* coordinates beyond 16777216",
        ),
        ({**GIVEN, "size": (20, 20)}, "image: box 1, .* has no area within the image of 20 x 20"),
        ({**GIVEN, "images": np.zeros((64, 96, 3), np.uint8), "size": (64, 96)}, "its own size"),
        ({**GIVEN, "classes": [0, 1, 9]}, "image: the model has no class 9"),
    ],
)
def test_predictor_without_image_bad_arguments_raise(predictor, arguments, message):
    with pytest.raises(ImageError, match=message):
        predictor(**arguments)


def test_saliency_without_feature_maps_raises(predictor):
    image = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(
        ImageError, match="^image: nothing to draw: this model has no visual module"
    ):
        feature_saliency(predictor, image)
    with pytest.raises(
        ImageError, match="^image: nothing to draw: this model has no visual module"
    ):
        triplet_saliency(predictor, image, detections=GIVEN)
