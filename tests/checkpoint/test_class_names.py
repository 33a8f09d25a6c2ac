"""Checkpoints and datasets that list their classes or predicates in another order, or others."""

import pytest
import torch
from model_utils import (
    CLASSES,
    PREDICATES,
    busy_item,
    give_distinct_statistics,
    model_of,
    small_model,
)

from reldn_d2 import RelDNCheckpointer
from reldn_d2.checkpoint import DetectorCheckpointer
from reldn_d2.checkpoint.class_weights import model_zoo_classes, num_classes_of
from reldn_d2.structures.name_matching import NameMismatchError

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathHandler, PathManager

DETECTOR = "configs/Toy/detector.yaml"
ORDER = [3, 8, 0, 5, 1, 7, 2, 6, 4]  # class i of the dataset is class ORDER[i] of the detector
PERMUTED = [CLASSES[i] for i in ORDER]
KINDS = ("faster_rcnn_FPN", "mask_rcnn_FPN", "cascade_rcnn_FPN", "faster_rcnn_C4", "retinanet_FPN")


def save_detector(folder, model, classes=CLASSES):
    give_distinct_statistics(model)
    if hasattr(model, "head"):  # RetinaNet: keep the sigmoids away from 1
        model.head.cls_score.weight.data.mul_(1e-4)
    DetectorCheckpointer(model, str(folder), thing_classes=classes).save("detector")
    return str(folder / "detector.pth")


def probabilities(model, item):
    """Return the (R, K) class probabilities that a model's detector gives to the item's boxes."""
    detector = model.eval().detector
    images = detector.preprocess([item])
    boxes = [item["instances"].gt_boxes]
    with torch.no_grad():
        features = detector.extract_features(images)
        return detector.classify([item], images, features, boxes)[0]


def detections(model, item):
    with torch.no_grad():
        return model.eval()([item])[0]["instances"]


@pytest.mark.parametrize("kind", KINDS)
def test_load_detector_in_other_order_maps_every_class_layer(tmp_path, kind, caplog):
    path = save_detector(tmp_path, model_of(kind).detector.model)
    straight, mapped = model_of(kind), model_of(kind)
    RelDNCheckpointer(straight, thing_classes=CLASSES).load(path)
    assert "by name" not in caplog.text
    with caplog.at_level("INFO", logger="reldn_d2"):
        RelDNCheckpointer(mapped, thing_classes=PERMUTED, names_owner="dataset 'x'").load(path)
    assert "took the 9 classes of dataset 'x' by name from the 9 of detector" in caplog.text
    assert caplog.text.count("by name") == 1
    item = busy_item()
    wanted = probabilities(straight, item)[:, ORDER]
    assert float(wanted.std(dim=1).min()) > 0  # else any order would do
    torch.testing.assert_close(probabilities(mapped, item), wanted)
    one, other = detections(straight, item), detections(mapped, item)
    assert len(one) == len(other)
    assert len(one) or kind == "retinanet_FPN"  # whose random boxes may all be empty
    named = [
        sorted(
            (names[c], round(s, 5), [round(x, 3) for x in box])
            for c, s, box in zip(
                x.pred_classes.tolist(), x.scores.tolist(), x.pred_boxes.tensor.tolist()
            )
        )
        for x, names in ((one, CLASSES), (other, PERMUTED))
    ]
    assert named[0] == named[1]
    if one.has("pred_masks"):
        assert one.pred_masks.sum() == other.pred_masks.sum()


def test_load_detector_with_more_classes_takes_those_of_the_data_set(tmp_path, caplog):
    path = save_detector(tmp_path, small_model(config=DETECTOR))
    whole, part = small_model(), small_model("MODEL.ROI_HEADS.NUM_CLASSES", 4)
    RelDNCheckpointer(whole, thing_classes=CLASSES).load(path)
    with caplog.at_level("INFO", logger="reldn_d2"):
        RelDNCheckpointer(part, thing_classes=["hat", " cup", "box", "drum"]).load(path)
    assert "took the 4 classes of the dataset by name from the 9" in caplog.text
    source = whole.detector.model.roi_heads.box_predictor
    found = part.detector.model.roi_heads.box_predictor
    rows = [5, 1, 8, 4]
    assert torch.equal(found.cls_score.weight, source.cls_score.weight[[*rows, 9]])
    boxes = source.bbox_pred.weight.reshape(9, 4, -1)[rows].flatten(0, 1)
    assert torch.equal(found.bbox_pred.weight, boxes)


@pytest.mark.parametrize("matching_only", [False, True])
def test_load_detector_without_a_class_of_the_data_set_raises(tmp_path, matching_only):
    path = save_detector(tmp_path, small_model(config=DETECTOR))
    names = ["hat", "Cup", "box", "dog"]
    checkpointer = RelDNCheckpointer(
        small_model("MODEL.ROI_HEADS.NUM_CLASSES", 4),
        thing_classes=names,
        names_owner="dataset 'x'",
        matching_only=matching_only,
    )
    with pytest.raises(NameMismatchError) as error:
        checkpointer.load(path)
    message = str(error.value)
    assert "Only in dataset 'x': 'Cup', 'dog' (2 of 4)" in message
    assert "'person', 'cup', 'ball', 'guitar', 'drum', ... (7 of 9)" in message
    assert "train the detector on this dataset first" in message
    assert "MATCHING_ONLY" not in message


@pytest.mark.parametrize("matching_only", [False, True])
def test_load_nameless_detector_of_other_count_raises(tmp_path, matching_only):
    """Whatever MATCHING_ONLY says: the frozen box predictor would stay random."""
    DetectionCheckpointer(small_model(config=DETECTOR), str(tmp_path)).save("detector")
    model = small_model("MODEL.ROI_HEADS.NUM_CLASSES", 4)
    with pytest.raises(ValueError, match="trained with 9 entity classes") as error:
        RelDNCheckpointer(model, matching_only=matching_only).load(str(tmp_path / "detector.pth"))
    assert "list all classes of the detector in the dataset, or train the" in str(error.value)
    assert "MATCHING_ONLY" not in str(error.value)


@pytest.mark.parametrize("kind", ["faster_rcnn_FPN", "cascade_rcnn_FPN"])
def test_load_detector_of_other_sizes_does_not_blame_the_classes(tmp_path, kind):
    """Although the shape of the class weights differs, too."""
    path = save_detector(tmp_path, model_of(kind, "MODEL.ROI_BOX_HEAD.FC_DIM", 32).detector.model)
    with pytest.raises(ValueError, match=r"cls_score\.weight|fc1\.weight") as error:
        RelDNCheckpointer(model_of(kind), thing_classes=CLASSES).load(path)
    assert "use its YAML as _BASE_, or repeat the options" in str(error.value)
    assert "entity classes" not in str(error.value) and "list all classes" not in str(error.value)


def test_load_matching_only_frozen_part_missing_raises(tmp_path):
    state = small_model(config=DETECTOR).state_dict()
    state = {name: x for name, x in state.items() if "box_predictor" not in name}
    torch.save({"model": state}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match=r"lacks 4 weights.*box_predictor\.cls_score"):
        RelDNCheckpointer(small_model(), matching_only=True).load(str(tmp_path / "detector.pth"))


@pytest.mark.parametrize("names", [None, CLASSES])
def test_load_nameless_detector_warns_once_if_the_data_set_has_names(tmp_path, caplog, names):
    DetectionCheckpointer(small_model(config=DETECTOR), str(tmp_path)).save("detector")
    RelDNCheckpointer(small_model(), thing_classes=names).load(str(tmp_path / "detector.pth"))
    assert caplog.text.count("does not name its classes: they are assumed") == bool(names)


def test_model_zoo_classes_only_for_coco():
    coco = MetadataCatalog.get("coco_2017_train").thing_classes
    url = "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"
    assert model_zoo_classes(url, 80) == coco
    address = "https://dl.fbaipublicfiles.com/detectron2/"
    assert model_zoo_classes(url.replace("detectron2://", address), 80) == coco
    assert model_zoo_classes(url, 1) is None  # people with keypoints
    assert model_zoo_classes("model_final_280758.pkl", 80) is None
    assert model_zoo_classes("detectron2://ImageNetPretrained/MSRA/R-50.pkl", None) is None


def test_load_model_zoo_coco_detector_takes_classes_by_name(tmp_path):
    detector = small_model("MODEL.ROI_HEADS.NUM_CLASSES", 80, config=DETECTOR)
    give_distinct_statistics(detector)
    DetectionCheckpointer(detector, str(tmp_path)).save("zoo")

    class Zoo(PathHandler):
        def _get_supported_prefixes(self):
            return ["detectron2://COCO-Test/"]

        def _get_local_path(self, path, **kwargs):
            return str(tmp_path / "zoo.pth")

    PathManager.register_handler(Zoo(), allow_override=True)
    model = small_model("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    names = ["cup", "person", "dog"]
    RelDNCheckpointer(model, thing_classes=names).load("detectron2://COCO-Test/zoo.pth")
    coco = MetadataCatalog.get("coco_2017_train").thing_classes
    rows = [*(coco.index(name) for name in names), 80]
    found = model.detector.model.roi_heads.box_predictor.cls_score.bias
    assert torch.equal(found, detector.roi_heads.box_predictor.cls_score.bias[rows])


def test_num_classes_of_counts_anchors_of_a_retinanet():
    assert num_classes_of(model_of("retinanet_FPN").detector.model.state_dict()) == 9
    assert num_classes_of(model_of("faster_rcnn_FPN").detector.model.state_dict()) == 9
    assert num_classes_of({"backbone.weight": torch.ones(1)}) is None


def test_load_precomputed_detector_ignores_class_names(tmp_path, caplog):
    path = save_detector(tmp_path, model_of("faster_rcnn_FPN").detector.model)
    RelDNCheckpointer(model_of("precomputed"), thing_classes=list("abcdefghi")).load(path)
    assert "name" not in caplog.text


@pytest.mark.parametrize("field", ["thing_classes", "predicate_classes"])
def test_load_reldn_in_other_order_keeps_the_order_of_the_checkpoint(tmp_path, field):
    names = {"thing_classes": CLASSES, "predicate_classes": PREDICATES}
    RelDNCheckpointer(small_model(), str(tmp_path), **names).save("reldn")
    model = small_model()
    other = {**names, field: [f" {name}" for name in reversed(names[field])]}
    checkpointer = RelDNCheckpointer(model, **other)
    assert model.names == other
    checkpointer.load(str(tmp_path / "reldn.pth"))
    assert model.names == names
    assert checkpointer.description[field] == names[field]


def test_load_reldn_with_other_predicates_raises_or_counts_the_table_again(tmp_path, caplog):
    source = small_model(seed=1)
    source.relation_head.semantic.set_log_frequencies(torch.randn(9, 9, 7))
    names = {"thing_classes": CLASSES, "predicate_classes": PREDICATES}
    RelDNCheckpointer(source, str(tmp_path), **names).save("reldn")
    path = str(tmp_path / "reldn.pth")
    other = {**names, "predicate_classes": [*PREDICATES[:-1], "inside"]}
    with pytest.raises(NameMismatchError, match="Only in the dataset: 'inside' .1 of 6.*MATCHING"):
        RelDNCheckpointer(small_model(), **other).load(path)
    model = small_model()
    RelDNCheckpointer(model, matching_only=True, **other).load(path)
    assert "'inside'" in caplog.text and model.names == other
    assert not bool(model.relation_head.semantic.counted)
    # The detector is frozen: other classes are an error whatever the key says.
    other = {**names, "thing_classes": [*CLASSES[:-1], "dog"]}
    with pytest.raises(NameMismatchError, match="Only in the dataset: 'dog'") as error:
        RelDNCheckpointer(small_model(), matching_only=True, **other).load(path)
    assert "MATCHING_ONLY" not in str(error.value)


def test_load_nameless_reldn_warns_if_the_data_set_has_names(tmp_path, caplog):
    RelDNCheckpointer(small_model(), str(tmp_path)).save("reldn")
    RelDNCheckpointer(small_model()).load(str(tmp_path / "reldn.pth"))
    assert "does not name" not in caplog.text
    RelDNCheckpointer(small_model(), thing_classes=CLASSES).load(str(tmp_path / "reldn.pth"))
    assert caplog.text.count("does not name its classes and predicates") == 1


def test_detector_checkpointer_other_classes_raises_or_trains_them_from_scratch(tmp_path):
    """A detector is trained, so its class layers may start from random weights."""
    path = save_detector(tmp_path, small_model(config=DETECTOR))
    names = [*CLASSES[:-1], "dog"]
    model = small_model(config=DETECTOR, seed=3)
    with pytest.raises(NameMismatchError, match="'dog'.*MATCHING_ONLY to True"):
        DetectorCheckpointer(model, thing_classes=names).load(path)
    before = model.roi_heads.box_predictor.cls_score.weight.clone()
    DetectorCheckpointer(model, thing_classes=names, matching_only=True).load(path)
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, before)
    assert model.names == {"thing_classes": names}
    DetectorCheckpointer(model, thing_classes=PERMUTED).load(path)
    assert model.names == {"thing_classes": CLASSES}


def test_load_checkpoint_with_wrong_count_of_names_raises(tmp_path):
    path = save_detector(tmp_path, small_model(config=DETECTOR), CLASSES[:8])
    with pytest.raises(ValueError, match="names 8 classes, but its weights are for 9"):
        RelDNCheckpointer(small_model(), thing_classes=CLASSES).load(path)
