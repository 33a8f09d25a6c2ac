"""The mapper: relations follow their entities through every augmentation."""

import copy
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_utils import ROOT
from PIL import Image
from torch.utils.data import SequentialSampler

import reldn_d2.data.dataset_mapper as dataset_mapper
from reldn_d2.data import RelationDatasetMapper
from reldn_d2.data.datasets import load_vrd
from reldn_d2.utils.image_io import ImageError, load_rgb

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

SIZE = 96
# Far from each other, and from any blend of one of them with the black background.
PALETTE = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("patches")


def annotation(box, category, **more):
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **more}


def patches_dict(folder, boxes, pairs):
    """Entity i is a patch in PALETTE[i] of class i; predicate 10 * i + j relates i to j."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for color, (x0, y0, x1, y1) in zip(PALETTE, boxes, strict=False):
        image[y0:y1, x0:x1] = color
    file_name = str(folder / "patches.png")
    Image.fromarray(image).save(file_name)
    return {
        "file_name": file_name,
        "image_id": 1,
        "height": SIZE,
        "width": SIZE,
        "annotations": [annotation(list(box), i, iscrowd=0) for i, box in enumerate(boxes)],
        "relations": [(i, j, 10 * i + j) for i, j in pairs],
    }


def mapper(augmentations=(), is_train=True, **kwargs):
    return RelationDatasetMapper(
        is_train=is_train, augmentations=list(augmentations), image_format="RGB", **kwargs
    )


def triplets(output):
    relations = output["relations"]
    assert relations.gt_pairs.dtype == relations.gt_predicates.dtype == torch.int64
    assert relations.gt_pairs.shape == (len(relations), 2)
    return [
        (*pair, predicate)
        for pair, predicate in zip(
            relations.gt_pairs.tolist(), relations.gt_predicates.tolist(), strict=True
        )
    ]


@st.composite
def scenes(draw):
    """Up to six patches, each in a cell of a 3 x 2 grid with a margin, and relations between."""
    boxes = []
    for cell in range(draw(st.integers(0, 6))):
        left, top = 32 * (cell % 3) + 4, 48 * (cell // 3) + 4
        x0, y0 = left + draw(st.integers(0, 10)), top + draw(st.integers(0, 20))
        width, height = draw(st.integers(6, 24 - x0 + left)), draw(st.integers(6, 40 - y0 + top))
        boxes.append((x0, y0, x0 + width, y0 + height))
    pairs = [(i, j) for i in range(len(boxes)) for j in range(len(boxes)) if i != j]
    return boxes, draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []


_SIDES = st.tuples(st.integers(64, 200), st.integers(64, 200))
_ALWAYS = dict(prob=st.just(1.0))
# by name of Detectron2's class: a strategy that builds it
AUGMENTATIONS = {
    "RandomFlip": st.one_of(
        st.builds(T.RandomFlip, **_ALWAYS, horizontal=st.just(True)),
        st.builds(T.RandomFlip, **_ALWAYS, horizontal=st.just(False), vertical=st.just(True)),
    ),
    "Resize": st.builds(T.Resize, _SIDES),
    "ResizeShortestEdge": st.builds(
        T.ResizeShortestEdge, st.integers(64, 160), st.integers(100, 250)
    ),
    "ResizeScale": st.builds(
        T.ResizeScale, st.just(0.7), st.just(1.5), st.integers(64, 200), st.integers(64, 200)
    ),
    "RandomCrop": st.one_of(
        st.builds(
            T.RandomCrop,
            st.sampled_from(["relative", "relative_range"]),
            st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
        ),
        st.builds(T.RandomCrop, st.just("absolute"), st.tuples(*[st.integers(30, 60)] * 2)),
    ),
    "FixedSizeCrop": st.builds(T.FixedSizeCrop, _SIDES),
    "RandomExtent": st.builds(T.RandomExtent, st.just((0.7, 1.3)), st.just((0.3, 0.3))),
    "RandomRotation": st.builds(T.RandomRotation, st.just([-180, 180]), expand=st.booleans()),
    "RandomBrightness": st.builds(T.RandomBrightness, st.just(0.95), st.just(1.0)),
    "RandomContrast": st.builds(T.RandomContrast, st.just(0.95), st.just(1.05)),
    "RandomSaturation": st.builds(T.RandomSaturation, st.just(0.95), st.just(1.05)),
    "RandomLighting": st.builds(T.RandomLighting, st.just(0.1)),
    "RandomApply": st.builds(
        T.RandomApply, st.builds(T.RandomFlip, **_ALWAYS), prob=st.floats(0, 1)
    ),
}
if hasattr(T, "MinIoURandomCrop"):  # Detectron2's main branch has these two
    AUGMENTATIONS["MinIoURandomCrop"] = st.builds(T.MinIoURandomCrop)
if hasattr(T, "RandomResize"):
    AUGMENTATIONS["RandomResize"] = st.builds(T.RandomResize, st.lists(_SIDES, min_size=1))
_OTHERS = {
    "Augmentation",  # base classes and lists
    "AugmentationList",
    "TransformGen",
    "RandomCrop_CategoryAreaConstraint",  # needs a semantic segmentation
    # Transforms wrapped as an augmentation:
    "_TransformToAug",
}


def test_augmentations_of_detectron2_are_all_tried():
    augmentations = {
        name
        for name, value in vars(T).items()
        if isinstance(value, type) and issubclass(value, T.Augmentation)
    }
    assert augmentations - _OTHERS == set(AUGMENTATIONS)


def pixels_of(image, color):
    """Return the (x, y) centers of the pixels of about this color."""
    near = np.abs(image.astype(int) - color).max(axis=2) < 60
    y, x = np.nonzero(near)
    return x + 0.5, y + 0.5


@settings(max_examples=150, deadline=None)
@given(
    scenes(),
    st.lists(st.one_of(*AUGMENTATIONS.values()), max_size=3),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_mapper_relations_follow_entities(folder, scene, augmentations, is_train, seed):
    """Classes identify the patch of an entity, and predicates the two patches of a relation."""
    boxes, pairs = scene
    if not boxes:  # some crops are chosen by the boxes
        augmentations = [x for x in augmentations if type(x).__name__ != "MinIoURandomCrop"]
    record = patches_dict(folder, boxes, pairs)
    np.random.seed(seed)
    output = mapper(augmentations, is_train)(record)

    image = output["image"].permute(1, 2, 0).numpy()
    instances = output["instances"]
    height, width = image.shape[:2]
    assert instances.image_size == output["relations"].image_size == (height, width)
    entities = instances.gt_classes.tolist()
    assert entities == sorted(set(entities)), "same order, no duplicates"
    if not is_train:
        assert entities == list(range(len(boxes)))

    for entity, box in zip(entities, instances.gt_boxes.tensor.tolist(), strict=True):
        x0, y0, x1, y1 = box
        assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
        x, y = pixels_of(image, PALETTE[entity])
        inside = (x > x0 - 1.5) & (x < x1 + 1.5) & (y > y0 - 1.5) & (y < y1 + 1.5)
        assert inside.all(), f"patch {entity} is outside its box {box}"
    for entity in set(range(len(boxes))) - set(entities):
        assert len(pixels_of(image, PALETTE[entity])[0]) == 0, f"patch {entity} was visible"

    named = [(entities[s], entities[o], p) for s, o, p in triplets(output)]
    assert named == [(i, j, 10 * i + j) for i, j in pairs if i in entities and j in entities]


def test_mapper_cropped_boxes_drop_relations(folder):
    """The crop keeps the right third, without patches 0 and 2."""
    boxes = [(4, 4, 20, 20), (70, 4, 90, 20), (4, 40, 60, 60), (50, 70, 90, 90)]
    record = patches_dict(folder, boxes, [(0, 1), (1, 3), (3, 2), (3, 1)])
    output = mapper([T.CropTransform(64, 0, 32, 96)])(record)
    assert output["instances"].gt_classes.tolist() == [1, 3]
    assert output["instances"].gt_boxes.tensor.tolist() == [[6, 4, 26, 20], [0, 70, 26, 90]]
    assert triplets(output) == [(0, 1, 13), (1, 0, 31)]


def test_mapper_inference_keeps_everything(folder):
    boxes = [(4, 4, 20, 20), (70, 4, 90, 20)]
    record = patches_dict(folder, boxes, [(1, 0), (0, 1)])
    record["annotations"][0]["iscrowd"] = 1
    record["annotations"].append(annotation([30, 30, 30, 50], 2))  # zero width
    record["relations"].append((2, 0, 20))
    output = mapper([T.Resize((192, 48))], is_train=False)(record)
    assert output["instances"].gt_classes.tolist() == [0, 1, 2]
    assert output["instances"].gt_boxes.tensor.tolist() == [
        [2, 8, 10, 40],
        [35, 8, 45, 40],
        [15, 60, 15, 100],
    ]
    assert triplets(output) == [(1, 0, 10), (0, 1, 1), (2, 0, 20)]
    assert output["height"] == output["width"] == SIZE, "the frame of the outputs"


def test_mapper_training_drops_crowds_and_remaps(folder):
    boxes = [(4, 4, 20, 20), (70, 4, 90, 20), (4, 40, 60, 60)]
    record = patches_dict(folder, boxes, [(0, 1), (1, 2), (2, 0), (2, 1)])
    record["annotations"][0]["iscrowd"] = 1
    output = mapper()(record)
    assert output["instances"].gt_classes.tolist() == [1, 2]
    assert triplets(output) == [(0, 1, 12), (1, 0, 21)]


def attributed(folder):
    """Three patches: with attributes, with none, and unknown; and a crowd in front of them."""
    boxes = [(0, 0, 96, 96), (4, 4, 20, 20), (70, 4, 90, 20), (4, 40, 60, 60)]
    record = patches_dict(folder, boxes, [(1, 2), (2, 3)])
    record["annotations"][0] |= {"iscrowd": 1, "attributes": [0]}
    record["annotations"][1]["attributes"] = [2, 0]
    record["annotations"][2]["attributes"] = []
    return record


@pytest.mark.parametrize("with_images", [True, False])
def test_mapper_attributes_follow_entities(folder, with_images):
    record = attributed(folder)
    options = dict(num_attributes=3, with_images=with_images)
    found = mapper(**options)(record)["instances"]
    assert found.gt_classes.tolist() == [1, 2, 3]
    assert found.gt_attributes.tolist() == [[True, False, True], [False] * 3, [False] * 3]
    assert found.gt_attributes_known.tolist() == [True, True, False]
    assert found.gt_attributes.dtype == found.gt_attributes_known.dtype == torch.bool
    found = mapper(is_train=False, **options)(record)["instances"]
    assert found.gt_attributes[:, 0].tolist() == [True, True, False, False]
    assert found.gt_attributes_known.tolist() == [True, True, True, False]
    # The crop leaves patch 2 alone; the flip moves it, not its attributes.
    right = [T.CropTransform(64, 0, 32, 96), T.RandomFlip(1.0)]
    found = mapper(right, **options)(record)["instances"]
    assert found.gt_classes.tolist() == [2]
    assert found.gt_attributes.tolist() == [[False] * 3]
    assert found.gt_attributes_known.tolist() == [True]


@pytest.mark.parametrize("with_images", [True, False])
def test_mapper_attributes_of_no_entity(folder, with_images):
    record = patches_dict(folder, [], [])
    found = mapper(num_attributes=3, with_images=with_images)(record)["instances"]
    assert found.gt_attributes.shape == (0, 3) and found.gt_attributes_known.shape == (0,)


@pytest.mark.parametrize("with_images", [True, False])
def test_mapper_dataset_without_attributes_has_no_field(folder, with_images):
    found = mapper(with_images=with_images)(attributed(folder))["instances"]
    assert found.get_fields().keys() == {"gt_boxes", "gt_classes"}


def test_mapper_attribute_out_of_range_raises(folder):
    message = r"patches\.png: annotation 1 has attributes \[2, 0\], but 2 is outside the 2 names"
    with pytest.raises(ValueError, match=message):
        mapper(num_attributes=2)(attributed(folder))


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("count", [0, 1])
def test_mapper_zero_or_one_annotation(folder, is_train, count):
    record = patches_dict(folder, [(4, 4, 20, 20)][:count], [])
    output = mapper([T.RandomFlip(), T.RandomCrop("relative", (0.9, 0.9))], is_train)(record)
    instances, relations = output["instances"], output["relations"]
    assert instances.gt_boxes.tensor.shape == (count, 4)
    assert instances.gt_classes.dtype == torch.int64 and len(instances) == count
    assert relations.gt_pairs.shape == (0, 2) and relations.gt_pairs.dtype == torch.int64
    assert relations.gt_predicates.shape == (0,) and relations.gt_predicates.dtype == torch.int64


def test_mapper_without_relations(folder):
    """A dict for detection only."""
    record = patches_dict(folder, [(4, 4, 20, 20), (40, 4, 60, 20)], [])
    del record["relations"]
    output = mapper()(record)
    assert len(output["instances"]) == 2 and len(output["relations"]) == 0


def test_mapper_plain_image_at_inference(folder):
    record = patches_dict(folder, [], [])
    del record["annotations"], record["relations"]
    output = mapper([T.Resize((48, 48))], is_train=False)(record)
    assert output["image"].shape == (3, 48, 48)
    assert "instances" not in output and "relations" not in output


def test_mapper_does_not_modify_dict(folder):
    record = patches_dict(folder, [(4, 4, 20, 20), (40, 4, 60, 20)], [(0, 1)])
    before = copy.deepcopy(record)
    mapper([T.Resize((48, 48))])(record)
    assert record == before


def test_mapper_recomputes_boxes_from_masks(folder):
    """Detectron2's option: a cropped mask may be tighter than its cropped box."""
    record = patches_dict(folder, [(0, 0, 40, 40), (50, 50, 60, 60)], [(0, 1), (1, 0)])
    y, x = np.mgrid[:SIZE, :SIZE]
    masks = [x + y < 40, (x >= 50) & (x < 60) & (y >= 50) & (y < 60)]
    for entity, mask in zip(record["annotations"], masks, strict=True):
        entity["segmentation"] = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    options = dict(use_instance_mask=True, recompute_boxes=True, instance_mask_format="bitmask")
    output = mapper([T.CropTransform(20, 0, 76, 96)], **options)(record)
    assert output["instances"].gt_boxes.tensor.tolist() == [[0, 0, 20, 20], [30, 50, 40, 60]]
    assert triplets(output) == [(0, 1, 1), (1, 0, 10)]
    output = mapper([T.CropTransform(39, 20, 50, 70)], **options)(record)
    assert output["instances"].gt_classes.tolist() == [
        1
    ], "only the box of the triangle is in the crop"
    assert triplets(output) == []
    empty = dict(record, annotations=[], relations=[])
    assert len(mapper(**options)(empty)["instances"]) == 0


def test_mapper_integer_boxes_are_not_rounded(folder):
    record = patches_dict(folder, [(3, 3, 22, 10)], [])
    output = mapper([T.Resize((32, 32)), T.Resize((144, 144))])(record)
    expected = torch.tensor([[3, 3, 22, 10]]) * 1.5
    torch.testing.assert_close(output["instances"].gt_boxes.tensor, expected)


class CropAroundFirstBox(T.Augmentation):
    """An augmentation that uses the boxes."""

    def get_transform(self, image, boxes):
        x0, y0, x1, y1 = (int(value) for value in boxes[0])
        return T.CropTransform(x0, y0, x1 - x0, y1 - y0)


def test_mapper_augmentation_uses_boxes(folder):
    record = patches_dict(folder, [(4, 4, 24, 20), (10, 10, 60, 30)], [(1, 0)])
    record["annotations"][0].update(bbox=[4, 4, 20, 16], bbox_mode=BoxMode.XYWH_ABS)
    output = mapper([CropAroundFirstBox()])(record)
    assert output["image"].shape == (3, 16, 20)
    assert output["instances"].gt_boxes.tensor.tolist() == [[0, 0, 20, 16], [6, 6, 20, 16]]
    assert triplets(output) == [(1, 0, 10)]


def without(record, index, key):
    del record["annotations"][index][key]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.update(relations=[(0, 2, 1)]), r"object index 2 .* 2 annotations"),
        (lambda r: r.update(relations=[(-1, 1, 1)]), r"subject index -1"),
        (lambda r: r.update(relations=[(1, 1, 1)]), r"annotation 1 to itself"),
        (lambda r: r.update(relations=[(0, 1, 30)]), r"predicate 30 .* 30 predicates"),
        (lambda r: r["annotations"][1].update(category_id=6), r"annotation 1 .* 6.* 6 classes"),
        (lambda r: r["annotations"][1].update(category_id=-1), r"annotation 1 .* -1"),
        (lambda r: without(r, 1, "bbox"), r'annotation 1 has no "bbox"'),
        (lambda r: without(r, 0, "bbox_mode"), r'annotation 0 has no "bbox_mode"'),
        (lambda r: without(r, 0, "category_id"), r'annotation 0 has no "category_id"'),
        (lambda r: r.pop("annotations"), r'no "annotations".* empty list'),
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_invalid_record_raises(folder, spoil, message, is_train):
    record = patches_dict(folder, [(4, 4, 20, 20), (40, 4, 60, 20)], [(0, 1)])
    spoil(record)
    with pytest.raises(ValueError, match=r"patches\.png: .*" + message):
        mapper(is_train=is_train, num_classes=6, num_predicates=30)(record)


@pytest.fixture
def metadata():
    """Sets names of datasets and removes them after the test."""

    def name_it(name, predicates, **more):
        names_of = {"thing_classes": ["a", "b"], "predicate_classes": predicates, **more}
        MetadataCatalog.get(name).set(**names_of)
        names.append(name)
        return name

    names = []
    yield name_it
    for name in names:
        MetadataCatalog.remove(name)


def test_mapper_from_config(metadata):
    cfg = get_cfg()
    cfg.INPUT.CROP.ENABLED = True
    cfg.DATASETS.TRAIN = (metadata("mapper_test_1", ["on"]),)
    cfg.DATASETS.TEST = (metadata("mapper_test_2", ["on", "under"]),)
    train, test = RelationDatasetMapper(cfg, True), RelationDatasetMapper(cfg, is_train=False)
    assert (train.num_classes, train.num_predicates, train.is_train) == (2, 1, True)
    assert (test.num_classes, test.num_predicates, test.is_train) == (2, 2, False)
    types = [type(augmentation) for augmentation in train.augmentations.augs]
    assert types == [T.RandomCrop, T.ResizeShortestEdge, T.RandomFlip]
    assert [type(a) for a in test.augmentations.augs] == [T.ResizeShortestEdge]


def test_mapper_from_config_counts_attributes(metadata):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (
        metadata("mapper_test_1", ["on"], attribute_classes=[]),
        metadata("mapper_test_2", ["on"], attribute_classes=["red", "old"]),
    )
    cfg.DATASETS.TEST = (metadata("mapper_test_3", ["on"]),)
    assert RelationDatasetMapper(cfg, True).num_attributes == 2
    assert RelationDatasetMapper(cfg, False).num_attributes == 0


def test_mapper_different_predicates_raise(metadata):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (
        metadata("mapper_test_1", ["on"]),
        metadata("mapper_test_2", ["on", "under"]),
    )
    message = "predicate_classes of .*'mapper_test_2'.*'mapper_test_1' differ.*'under' .1 of 2"
    with pytest.raises(ValueError, match=message):
        RelationDatasetMapper(cfg, True)


def test_mapper_real_images_in_train_loader(real_datasets):
    """VRD with the usual augmentation: all indices are valid, and flips keep classes with boxes."""
    records = load_vrd(
        str(real_datasets / "vrd/json_dataset/annotations_test.json"),
        str(real_datasets / "vrd/sg_dataset/sg_test_images"),
    )
    records = [record for record in records if record["relations"]][:4]
    # Detectron2 resizes first, then flips.
    augmentations = [T.ResizeShortestEdge(200, 400), T.RandomFlip(prob=1.0)]
    mapped = RelationDatasetMapper(True, augmentations=augmentations, image_format="BGR")
    loader = build_detection_train_loader(
        records,
        mapper=mapped,
        sampler=SequentialSampler(records),
        total_batch_size=2,
        aspect_ratio_grouping=False,
    )
    outputs = [output for batch in loader for output in batch]
    assert [output["image_id"] for output in outputs] == [r["image_id"] for r in records]
    for record, output in zip(records, outputs, strict=True):
        assert triplets(output) == record["relations"]
        width = output["image"].shape[2]
        boxes = np.array([annotation["bbox"] for annotation in record["annotations"]])
        scale = width / record["width"]
        left = output["instances"].gt_boxes.tensor[:, 0].numpy()
        np.testing.assert_allclose(left, width - boxes[:, 2] * scale, atol=1e-3)


def test_own_data_guide_example_runs(tmp_path, monkeypatch, capsys):
    guide = ROOT / "docs/own_data.md"
    example, *_ = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(example, str(guide), "exec"), {})
        printed = capsys.readouterr().out
        assert "['on', 'under']\n[(1, 0, 0), (0, 1, 1)]" in printed
        assert "torch.Size([3, 75, 100])" in printed
        assert "gt_pairs: tensor([[1, 0],\n        [0, 1]])" in printed
    finally:
        DatasetCatalog.remove("my_data_set")
        MetadataCatalog.remove("my_data_set")


def jpeg(path, size=(SIZE, SIZE)):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path
    )
    return path


def truncated(path):
    path.write_bytes(jpeg(path).read_bytes()[:-600])


def not_an_image(path):
    path.write_bytes(b"not an image")


UNREADABLE = {
    "truncated": (truncated, "truncated"),
    "not an image": (not_an_image, "cannot identify|not an image"),
    "absent": (lambda path: None, "No such file|no such file"),
    "another size": (lambda path: jpeg(path, (SIZE, SIZE + 1)), "Mismatched image shape"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_unreadable_image_error_names_the_file(tmp_path, case, is_train):
    spoil, message = UNREADABLE[case]
    record = patches_dict(tmp_path, [(0, 0, 9, 9)], [])
    path = tmp_path / "broken.jpg"
    spoil(path)
    record["file_name"] = str(path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        mapper(is_train=is_train)(record)
    assert str(path) in str(error.value)


def test_mapper_image_of_too_many_pixels_error_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE // 2 - 1)
    record = patches_dict(tmp_path, [(0, 0, 9, 9)], [])
    with pytest.raises(ValueError, match="pixels") as error:
        mapper()(record)
    assert record["file_name"] in str(error.value)


def test_mapper_failing_augmentation_error_names_the_file(tmp_path):
    class Failing(T.Augmentation):
        def get_transform(self, image):
            raise RuntimeError("too small to crop")

    record = patches_dict(tmp_path, [(0, 0, 9, 9)], [])
    message = rf"^{record['file_name']}: cannot be mapped .*RuntimeError: too small to crop\)\.$"
    with pytest.raises(ValueError, match=message):
        mapper([Failing()])(record)


def test_mapper_malformed_box_error_names_the_file(tmp_path):
    record = patches_dict(tmp_path, [(0, 0, 9, 9)], [])
    record["annotations"][0]["bbox"] = "0 0 9 9"
    with pytest.raises(ValueError, match=record["file_name"]):
        mapper()(record)


def deep_ramp(path):
    values = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    Image.fromarray(values.astype(np.uint16)).save(path)


def float_ramp(path):
    values = np.linspace(0, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    Image.fromarray(values).save(path)


def half_transparent(path):
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[: SIZE // 2, :, :3] = 254
    pixels[: SIZE // 2, :, 3] = 255
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    "name, write, mean",
    [("x.png", deep_ramp, 127.5), ("x.tif", float_ramp, 127.5), ("y.png", half_transparent, 254.5)],
)
def test_mapper_reads_images_as_the_predictor_does(name, write, mean, is_train, tmp_path):
    path = tmp_path / name
    write(path)
    record = {"file_name": str(path), "image_id": 1, "height": SIZE, "width": SIZE}
    record |= {"annotations": [annotation([1, 1, 50, 50], 0, iscrowd=0)], "relations": []}
    image = mapper(is_train=is_train)(record)["image"].numpy().transpose(1, 2, 0)
    assert np.array_equal(image, load_rgb(path)) and image.mean() == pytest.approx(mean, abs=0.6)


@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_truncated_image_names_the_file(is_train, tmp_path):
    Image.effect_noise((SIZE, SIZE), 60).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    record = {"file_name": str(tmp_path / "cut.jpg"), "height": SIZE, "width": SIZE}
    record |= {"annotations": [], "relations": []}
    with pytest.raises(ImageError, match=r"cut\.jpg: cannot be read as an image: .*truncated"):
        mapper(is_train=is_train)(record)


# ----------------------------------------------------------------------------------- without images


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    "augmentation",
    [None, T.RandomFlip(1.0), T.RandomFlip(1.0, horizontal=False, vertical=True), "crop"],
)
def test_mapper_without_images_equals_mapper_with(tmp_path, monkeypatch, augmentation, is_train):
    boxes = [(4, 4, 40, 30), (35, 10, 70, 60), (50, 50, 96, 96), (0, 70, 20, 80)]
    record = patches_dict(tmp_path, boxes, [(0, 1), (1, 2), (2, 3), (3, 0)])
    record["annotations"][3]["iscrowd"] = 1
    record["annotations"].append(annotation([80, 0, 120, 9], 5, iscrowd=0))  # beyond the image
    record["detections"] = {
        "boxes": np.array([[1, 2, 30, 40]], np.float32),
        "scores": np.array([0.5], np.float32),
        "classes": np.array([1]),
    }
    before = copy.deepcopy(record)
    augmentations = [augmentation] if augmentation else []
    if augmentation == "crop":
        augmentations = [T.CropTransform(30, 5, 50, 70)]
    expected = mapper(augmentations, is_train)(record)
    monkeypatch.setattr(dataset_mapper, "read_image", None)
    found = mapper([*augmentations, T.ResizeShortestEdge(48)], is_train, with_images=False)(record)
    assert "image" not in found and found["image_id"] == 1
    assert triplets(found) == triplets(expected) and len(triplets(found)) > 0
    for key in ("instances", "detections"):
        assert found[key].image_size == expected[key].image_size
        assert found[key].get_fields().keys() == expected[key].get_fields().keys()
        for name, value in found[key].get_fields().items():
            other = expected[key].get(name)
            tensors = [x.tensor if hasattr(x, "tensor") else x for x in (value, other)]
            assert torch.equal(*tensors), name
    assert str(record) == str(before), "the dict is not modified"


def test_mapper_without_images_keeps_results_unless_augmented():
    resized = mapper([T.ResizeShortestEdge(48)], with_images=False)
    assert resized.keeps_results and resized.augmentations.augs == []
    assert not mapper([T.RandomFlip()], with_images=False).keeps_results
    assert not mapper([]).keeps_results
    record = {"image_id": 3, "height": 9, "width": 9, "annotations": [], "relations": []}
    mapped = resized(record)
    assert mapped["derived"] == {} and len(mapped["instances"]) == len(mapped["relations"]) == 0
    assert "derived" not in mapper([], is_train=False, with_images=False)(record)
    plain = {"image_id": 3, "height": 9, "width": 9}
    assert mapper([], is_train=False, with_images=False)(plain) == plain
    with pytest.raises(
        ValueError, match="^3: cannot be mapped to a model input .KeyError: 'width'"
    ):
        resized({key: value for key, value in record.items() if key != "width"})
