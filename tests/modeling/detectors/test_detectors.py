"""Every kind of detector: trained and evaluated on the built-in dataset; tasks; what is copied."""

import json

import pytest
import torch
from model_utils import (
    ROOT,
    SIZE,
    busy_item,
    detector_config,
    empty_item,
    model_of,
    small_config,
)
from usage_utils import picture

import reldn_d2
from reldn_d2.checkpoint.reldn_checkpoint import (
    DetectorCheckpointer,
    initialize_relation_branch,
    pretrained_predicate_modules,
)
from reldn_d2.engine.defaults import RelDNTrainer, check_counts
from reldn_d2.engine.optimizer import build_optimizer
from reldn_d2.export import RelDNExport, save_torchscript
from reldn_d2.modeling.detectors import (
    ENTITY_DETECTOR_REGISTRY,
    EntityDetector,
    PrecomputedDetector,
    classify_by_overlap,
)
from reldn_d2.modeling.detectors.precomputed import FeatureExtractor

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

KINDS = {
    "faster_rcnn_FPN": "GeneralizedRCNNDetector",
    "mask_rcnn_FPN": "GeneralizedRCNNDetector",
    "faster_rcnn_VGG16": "GeneralizedRCNNDetector",
    "cascade_rcnn_FPN": "CascadeRCNNDetector",
    "faster_rcnn_C4": "C4RCNNDetector",
    "retinanet_FPN": "RetinaNetDetector",
    "precomputed": "PrecomputedDetector",
}
SPLITS = {"train": 8, "test": 4}


@pytest.fixture(scope="module")
def toy():
    """The first images of the built-in dataset."""
    for split, number in SPLITS.items():
        dicts = DatasetCatalog.get(f"toy_vrd_{split}")[:number]
        known = MetadataCatalog.get(f"toy_vrd_{split}").as_dict()
        DatasetCatalog.register(f"toy_{split}_few", lambda dicts=dicts: dicts)
        MetadataCatalog.get(f"toy_{split}_few").set(
            **{key: value for key, value in known.items() if key != "name"}
        )
    yield
    for split in SPLITS:
        DatasetCatalog.remove(f"toy_{split}_few")
        MetadataCatalog.remove(f"toy_{split}_few")


def write_detections(folder, noise=2.0):
    """Detections near the truth, as COCO results; boxes XYWH in the original image."""
    generator, files = torch.Generator().manual_seed(0), {}
    for split in SPLITS:
        results = []
        for record in DatasetCatalog.get(f"toy_{split}_few"):
            for annotation in record["annotations"]:
                x0, y0, x1, y1 = annotation["bbox"]
                dx, dy = (noise * torch.rand(2, generator=generator)).tolist()
                results.append(
                    {
                        "image_id": record["image_id"],
                        "category_id": annotation["category_id"],
                        "bbox": [x0 + dx, y0 + dy, x1 - x0, y1 - y0],
                        "score": 0.9,
                    }
                )
        files[split] = folder / f"{split}.json"
        files[split].write_text(json.dumps(results))
    return files


def files_options(files):
    return [
        part
        for split, path in files.items()
        for part in (f"DATASETS.DETECTION_FILES_{split.upper()}", (str(path),))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_detector_trains_and_evaluates_on_toy_data(tmp_path, toy, kind):
    detector = build_model(detector_config(kind, "MODEL.META_ARCHITECTURE", _architecture(kind)))
    DetectorCheckpointer(detector, str(tmp_path)).save("detector")
    options = [
        *("MODEL.WEIGHTS", str(tmp_path / "detector.pth"), "OUTPUT_DIR", str(tmp_path / "run")),
        *("DATASETS.TRAIN", ("toy_train_few",), "DATASETS.TEST", ("toy_test_few",)),
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SEED", 1),
        *("MODEL.RELDN.TRAIN_ENTITIES", "proposals"),
    ]
    if kind == "precomputed":
        options += files_options(write_detections(tmp_path))
    trainer = RelDNTrainer(detector_config(kind, *options))
    assert type(trainer.model.detector).__name__ == KINDS[kind]
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.resume_or_load(resume=False)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("relation_head.") for n in moved)
    assert any(n.startswith("predicate_backbone.") for n in moved)
    assert not any(n.startswith("detector.") for n in moved)
    weights = ("MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth"))
    for task in ("sgdet", "sgcls", "prdcls"):  # one checkpoint, one key
        cfg = detector_config(kind, *options, *weights, "TEST.RELATIONS.TASK", task)
        results = RelDNTrainer.evaluate_checkpoint(cfg)
        (metrics,) = (x for name, x in results.items() if name.startswith("relations"))
        assert 0 <= metrics["R@50"] <= 100
        if task == "prdcls" or (kind, task) == ("precomputed", "sgcls"):
            assert metrics["R@100"] > 15  # boxes and classes are right, and few pairs


def _architecture(kind):
    return {"retinanet_FPN": "RetinaNet"}.get(kind, "GeneralizedRCNN")


@pytest.mark.parametrize("kind", KINDS)
def test_each_detector_given_boxes_are_classified_and_all_paired(kind):
    model = model_of(kind, "TEST.RELATIONS.TOPK", 10_000).eval()
    batch = [{**busy_item(0), "detections": detections()}, {**empty_item(), "detections": none()}]
    images = model.detector.preprocess(batch)
    features = model.detector.extract_features(images)
    boxes = [x["instances"].gt_boxes for x in batch]
    with torch.no_grad():
        classified = model.detector.classify(batch, images, features, boxes)
        for x, given in zip(classified, boxes):
            assert x.shape == (len(given), 9) and ((x >= 0) & (x <= 1)).all()
        for task in ("sgcls", "prdcls"):
            model.task = task
            results = model(batch)
            assert results[0]["instances"].pred_boxes.tensor.tolist() == boxes[0].tensor.tolist()
            pairs = {tuple(x) for x in results[0]["relations"].pairs.tolist()}
            assert pairs == {(i, j) for i in range(4) for j in range(4) if i != j}
            assert len(results[1]["relations"]) == 0
        best = classified[0].max(dim=1)
        model.task = "sgcls"
        assert torch.equal(model(batch)[0]["instances"].pred_classes, best.indices)


def detections():
    """Two detections, on the first and on the third box of the busy image."""
    result = Instances(SIZE)
    result.pred_boxes = Boxes(torch.tensor([[11.0, 5, 41, 60], [60.0, 25, 75, 40]]))
    result.scores = torch.tensor([0.5, 0.8])
    result.pred_classes = torch.tensor([0, 1])
    return result


def none():
    return detections()[:0]


@pytest.mark.parametrize("kind", KINDS)
def test_initialize_relation_branch_copies_detector_weights(kind):
    model = model_of(kind)
    initialize_relation_branch(model)
    source = model.detector.backbone.state_dict()
    for name, value in model.predicate_backbone.state_dict().items():
        assert torch.equal(value, source[name])
    copied = kind != "retinanet_FPN"
    for box_head in model.relation_head.box_heads:
        if copied:
            wanted = model.detector.box_head.state_dict()
            assert list(box_head.state_dict()) == list(wanted)
            assert all(torch.equal(x, wanted[n]) for n, x in box_head.state_dict().items())
    # Without a box head to start from, the predicate box head learns at the full rate, too.
    slow = pretrained_predicate_modules(model)
    assert len(slow) == (2 if copied else 1)
    optimizer = build_optimizer(
        detector_config(kind, "SOLVER.OPTIMIZER", "SGD", "SOLVER.BACKBONE_MULTIPLIER", 0.1), model
    )
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    head = model.relation_head
    for box_head, factor in (
        (head.subject_box_head, 1.0),
        (head.object_box_head, 1.0),
        (head.predicate_box_head, 0.1 if copied else 1.0),
    ):
        weight = next(p for p in box_head.parameters() if p.ndim > 1)
        assert rates[id(weight)] == pytest.approx(0.001 * factor)


@pytest.mark.parametrize(
    "kind", ["faster_rcnn_FPN", "faster_rcnn_VGG16", "cascade_rcnn_FPN", "faster_rcnn_C4"]
)
def test_propose_keeps_as_many_proposals_as_the_detector_in_training(kind):
    limits = (
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 9, "MODEL.RPN.POST_NMS_TOPK_TEST", 7),
        *("MODEL.RPN.NMS_THRESH", 1.0),  # so that the limits decide
    )
    model = model_of(kind, *limits).train()
    detector, batch = model.detector, [busy_item(0), busy_item(1)]
    images = detector.preprocess(batch)
    with torch.no_grad():
        features = detector.extract_features(images)
        proposals = detector.propose(batch, images, features)
        assert [len(x) for x in proposals] == [30, 30]
        # Exactly those of the RPN in training mode; and the detector itself does not change.
        rpn = detector.model.proposal_generator
        wanted = rpn.predict_proposals(*_rpn_outputs(rpn.train(), features), images.image_sizes)
        rpn.eval()
        for found, x in zip(proposals, wanted):
            assert torch.equal(found.tensor, x.proposal_boxes.tensor)
        assert [len(x) for x in detector._proposals(batch, images, features)] == [7, 7]
    assert not any(module.training for module in detector.modules())


def _rpn_outputs(rpn, features):
    """Anchors, logits and deltas, in the order and shapes of ``predict_proposals``."""
    maps = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator(maps)
    logits, deltas = rpn.rpn_head(maps)
    logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    deltas = [
        x.view(x.shape[0], -1, 4, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2)
        for x in deltas
    ]
    return anchors, logits, deltas


def test_classify_by_overlap_takes_best_product_of_score_and_iou():
    given = Boxes(torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]))
    found = Boxes(torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10], [100, 100, 110, 110]]))
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.0], [1.0, 1.0]])
    result = classify_by_overlap(given, found, scores)
    torch.testing.assert_close(result, torch.tensor([[0.45, 0.05], [0.0, 0.0]]))
    assert classify_by_overlap(given, found[:0], scores[:0]).tolist() == [[0, 0], [0, 0]]
    assert classify_by_overlap(given[:0], found, scores).shape == (0, 2)


def test_precomputed_detector_filters_detections_and_missing_raise():
    model = model_of("precomputed", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.6)
    item = {**busy_item(0), "detections": detections()}
    images = model.detector.preprocess([item])
    (found,) = model.detector.detect([item], images, {})
    assert found.scores.tolist() == pytest.approx([0.8])
    model.detector.score_threshold, model.detector.max_detections = 0.0, 1
    assert model.detector.detect([item], images, {})[0].scores.tolist() == pytest.approx([0.8])
    with pytest.raises(ValueError, match="image-0.*without 'detections'.*DETECTION_FILES_TRAIN"):
        model.detector.detect([busy_item(0)], images, {})


def test_registered_detector_is_selected_and_trains():
    @ENTITY_DETECTOR_REGISTRY.register()
    class FixedDetector(EntityDetector):
        """Always the same box; six methods are all that a new kind has to provide."""

        def __init__(self, cfg):
            from detectron2.modeling import build_backbone

            super().__init__(FeatureExtractor(build_backbone(cfg), None, [0.0] * 3, [1.0] * 3))

        @classmethod
        def accepts(cls, cfg):
            return cfg.MODEL.ROI_HEADS.NAME == "FixedHeads"

        num_classes = 9

        def propose(self, batched_inputs, images, features):
            return [Boxes(torch.tensor([[10.0, 5, 40, 60]])) for _ in batched_inputs]

        def detect(self, batched_inputs, images, features):
            return [detections() for _ in batched_inputs]

        def classify(self, batched_inputs, images, features, boxes):
            return [torch.full((len(x), 9), 1 / 9) for x in boxes]

    try:
        # K is the detector's, whatever Detectron2's key says.
        more = ("MODEL.ROI_HEADS.NAME", "FixedHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 80)
        model = model_of("faster_rcnn_FPN", *more)
        check_counts(small_config(*more), model)
        assert model.relation_head.num_classes == 9
        assert isinstance(model.detector, FixedDetector)
        initialize_relation_branch(model)
        model.train()
        with EventStorage():
            losses = model([busy_item(0)])
        sum(losses.values()).backward()
        results = model.eval()([busy_item(0)])
        assert len(results[0]["instances"]) == 2 and len(results[0]["relations"]) == 12
    finally:
        del ENTITY_DETECTOR_REGISTRY._obj_map["FixedDetector"]


def test_build_entity_detector_no_adapter_raises(monkeypatch):
    for adapter in dict(ENTITY_DETECTOR_REGISTRY).values():
        monkeypatch.setattr(adapter, "accepts", classmethod(lambda cls, cfg: False))
    with pytest.raises(ValueError, match="no adapter knows.*StandardROIHeads.*RetinaNetDetector"):
        model_of("faster_rcnn_FPN")


def test_detector_wrong_adapter_raises():
    with pytest.raises(TypeError, match="CascadeRCNNDetector works with CascadeROIHeads.*Standard"):
        model_of("faster_rcnn_FPN", "MODEL.RELDN.DETECTOR", "CascadeRCNNDetector")
    with pytest.raises(TypeError, match="works with StandardROIHeads, but these are Cascade"):
        model_of("cascade_rcnn_FPN", "MODEL.RELDN.DETECTOR", "GeneralizedRCNNDetector")


def test_detector_configs_cover_every_adapter():
    files = {path.stem for path in (ROOT / "configs/Toy/Detectors").glob("*.yaml")}
    assert files == set(KINDS) - {"faster_rcnn_FPN"}
    assert reldn_d2.__version__ and issubclass(PrecomputedDetector, EntityDetector)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", KINDS)
def test_export_each_detector_equals_eager(kind, tmp_path):
    model = model_of(kind).eval()
    images = [torch.as_tensor(picture(64, 96, seed).transpose(2, 0, 1).copy()) for seed in (1, 2)]
    example, other = (image.float() for image in images)
    if kind == "precomputed":
        with pytest.raises(TypeError, match="detections come from files cannot be exported"):
            RelDNExport(model)
        return
    save_torchscript(RelDNExport(model), [example], tmp_path / "x.ts")
    with torch.no_grad():
        found = torch.jit.load(tmp_path / "x.ts")(other)
        expected = model.inference([{"image": other}], do_postprocess=False)[0]["relations"]
    assert len(expected) > 0 and torch.equal(found[3], expected.pairs)
    assert torch.equal(found[4], expected.predicates)
    torch.testing.assert_close(found[5], expected.scores, rtol=0, atol=1e-6)
