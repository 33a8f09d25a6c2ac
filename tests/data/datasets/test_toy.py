"""The toy dataset: its images, their cues, and its folder of drawn files."""

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from reldn_d2.data.datasets.toy import dataset as toy_vrd
from reldn_d2.data.datasets.toy.drawing import CLEAR_GAP, REACH_GAP, ToyScene, box_gap
from reldn_d2.data.datasets.toy.scenes import make_scene
from reldn_d2.data.datasets.toy.shapes import HAND_RADIUS, Layer, render
from reldn_d2.structures.relations import check_relation_triplets

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

FURNITURE = {"table": ("on", "under"), "chair": ("on", "under"), "box": ("inside of",)}
CLASSES = ["person", "cup", "ball", "guitar", "drum", "hat", "chair", "table", "box"]
PREDICATES = ["holds", "plays", "wears", "on", "under", "inside of"]


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(np.random.default_rng([5, index])) for index in range(500)]


@pytest.fixture
def small_root(tmp_path):
    toy_vrd.load_toy_vrd(str(tmp_path), "test", num_images=6)
    return tmp_path


def related(scene: ToyScene, subject: int, object_: int):
    return {p for s, o, p in scene.relations if (s, o) == (subject, object_)}


def triplets(scenes):
    for scene in scenes:
        for subject, object_, predicate in scene.relations:
            yield scene, scene.entities[subject], scene.entities[object_], object_, predicate


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both - width * height)


def test_draw_toy_image_same_seed_same_image():
    image, record = toy_vrd.draw_toy_image(3, 8)
    again, same_record = toy_vrd.draw_toy_image(3, 8)
    other, other_record = toy_vrd.draw_toy_image(3, 9)
    assert image.shape == (160, 160, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, again)
    assert record == same_record
    assert not np.array_equal(image, other) and record != other_record


def test_toy_boxes_are_tight(scenes):
    blank = np.full((160, 160, 3), 120, np.uint8)
    seen = Counter()
    for scene in scenes[:60]:
        for entity in scene.entities:
            drawn = np.abs(render(entity.shapes, blank).astype(int) - 120).max(axis=2) > 8
            rows, columns = np.nonzero(drawn)
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            np.testing.assert_allclose(entity.box, tight, atol=1.3, err_msg=entity.category)
            seen[entity.category] += 1
    assert set(seen) == set(CLASSES)


def test_toy_boxes_inside_image_and_distinct(scenes):
    for scene in scenes:
        boxes = np.array([entity.box for entity in scene.entities])
        assert len(boxes) >= 2
        assert boxes.min() >= 0 and boxes.max() <= 160
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 6
        for index, one in enumerate(scene.entities):
            for other in scene.entities[:index]:
                if one.category == other.category:
                    assert iou(one.box, other.box) <= 0.3


def test_toy_class_and_predicate_counts(scenes):
    entities = Counter(e.category for scene in scenes for e in scene.entities)
    predicates = Counter(p for scene in scenes for _, _, p in scene.relations)
    assert 6 <= sum(entities.values()) / len(scenes) <= 12
    assert sum(predicates.values()) / len(scenes) >= 3
    assert all(entities[category] >= 0.2 * len(scenes) for category in CLASSES)
    assert all(predicates[predicate] >= 0.15 * len(scenes) for predicate in PREDICATES)
    empty = sum(not scene.relations for scene in scenes) / len(scenes)
    assert 0.005 <= empty <= 0.05


def test_toy_relations_are_valid_and_unique(scenes):
    for scene in scenes:
        relations = [(s, o, PREDICATES.index(p)) for s, o, p in scene.relations]
        check_relation_triplets(relations, len(scene.entities), len(PREDICATES))
        assert len({(s, o) for s, o, _ in relations}) == len(relations)


@pytest.mark.parametrize("category", ["ball", "guitar", "drum"])
def test_toy_class_pair_has_two_predicates(scenes, category):
    found = Counter(p for _, _, thing, _, p in triplets(scenes) if thing.category == category)
    assert min(found["holds"], found["plays"]) >= 15


def test_toy_hands_touch_only_related_things(scenes):
    reaches = touches = 0
    for scene in scenes:
        touched = set()
        for hand in scene.hands:
            gaps = {
                index: entity.distance(hand) - HAND_RADIUS
                for index, entity in enumerate(scene.entities)
                if entity.category != "person"
            }
            assert all(gap < -1 or gap >= CLEAR_GAP - 1e-3 for gap in gaps.values())
            touched |= {index for index, gap in gaps.items() if gap < 0}
            reaches += any(REACH_GAP[0] <= gap <= REACH_GAP[1] + 0.1 for gap in gaps.values())
        hand_relations = {
            object_
            for _, _, thing, object_, predicate in triplets([scene])
            if predicate == "holds" or (predicate == "plays" and thing.category != "drum")
        }
        assert touched == hand_relations
        touches += len(touched)
    assert reaches > 0.3 * touches > 0


def test_toy_union_box_contains_hand(scenes):
    for scene, person, thing, _, predicate in triplets(scenes):
        if predicate == "holds":
            low = np.minimum(person.box[:2], thing.box[:2])
            high = np.maximum(person.box[2:], thing.box[2:])
            hand = np.array(min(scene.hands, key=thing.distance))
            assert (hand >= low - 1.5).all() and (hand <= high + 1.5).all()


def offset(person, thing):
    """Return the horizontal and vertical distance of a thing from a person's chest."""
    return np.abs(np.subtract(thing.center, person.chest))


@pytest.mark.parametrize("categories, most", [(("cup", "ball"), 0.42), (("guitar", "drum"), 0.45)])
def test_toy_nearest_thing_is_seldom_related(scenes, categories, most):
    hits = []
    for scene, person, thing, _, _ in triplets(scenes):
        equal = [e for e in scene.entities if e.category == thing.category]
        if thing.category in categories and len(equal) > 1:
            distances = [np.hypot(*offset(person, entity)) for entity in equal]
            hits.append(equal[int(np.argmin(distances))] is thing)
    assert len(hits) > 150 and np.mean(hits) < most


def test_toy_held_and_free_things_same_distribution(scenes):
    held, free = [], []
    for scene, person, thing, _, predicate in triplets(scenes):
        if predicate != "holds" or thing.category not in ("cup", "ball"):
            continue
        taken = {object_ for _, object_, _ in scene.relations}
        held.append(offset(person, thing))
        for index, entity in enumerate(scene.entities):
            if entity.category == thing.category and index not in taken:
                if np.hypot(*offset(person, entity)) < 47:
                    free.append(offset(person, entity))
    assert min(len(held), len(free)) > 200
    np.testing.assert_allclose(np.mean(held, axis=0), np.mean(free, axis=0), atol=2.5)
    np.testing.assert_allclose(np.std(held, axis=0), np.std(free, axis=0), atol=2.5)


def test_toy_hats_worn_iff_touching_head(scenes):
    worn = 0
    for scene in scenes:
        for subject, person in enumerate(scene.entities):
            for object_, thing in enumerate(scene.entities):
                if person.category != "person" or thing.category != "hat":
                    continue
                if related(scene, subject, object_):
                    worn += 1
                    assert person.distance((thing.center[0], thing.box[3])) < -2
                else:
                    assert box_gap(person.box, thing.box) >= 2.2
    assert worn > 100


def test_toy_furniture_look_alikes_do_not_relate(scenes):
    look_alikes = 0
    for scene in scenes:
        for object_, owner in enumerate(scene.entities):
            for subject, thing in enumerate(scene.entities):
                if owner.category not in FURNITURE or thing.category not in ("cup", "ball", "hat"):
                    continue
                found = related(scene, subject, object_)
                assert len(found) <= 1 and found <= set(FURNITURE[owner.category])
                layer, overlap = thing.shapes[0].layer, -box_gap(thing.box, owner.box)
                if found:
                    assert overlap > 2 and layer < Layer.FRONT
                elif overlap > -1:
                    look_alikes += 1
                    assert layer == Layer.FRONT or thing.box[3] < owner.outlines[0][:, 1].max()
                    assert layer == Layer.FRONT or _keeps_gap(thing, owner)
    assert look_alikes > 50


def _keeps_gap(thing, seat_owner):
    """Return whether a thing over a chair's seat, next to its back, keeps a gap from the seat."""
    x0, y0, x1, y1 = seat_owner.box
    return seat_owner.category == "chair" and thing.box[3] < y0 + 0.52 * (y1 - y0) - 6 - 2


def test_load_toy_vrd_dataset_dicts(small_root):
    dicts = toy_vrd.load_toy_vrd(str(small_root), "test", num_images=6)
    assert [d["image_id"] for d in dicts] == [1, 2, 3, 4, 5, 6]
    for record in dicts:
        image = cv2.imread(record["file_name"])
        assert image.shape == (record["height"], record["width"], 3)
        check_relation_triplets(record["relations"], len(record["annotations"]), len(PREDICATES))
        for annotation in record["annotations"]:
            assert annotation["bbox_mode"] == BoxMode.XYXY_ABS and annotation["iscrowd"] == 0
            assert 0 <= annotation["category_id"] < len(CLASSES)
    image, record = toy_vrd.draw_toy_image(toy_vrd._SPLITS["test"][0], 1)
    np.testing.assert_array_equal(cv2.imread(dicts[0]["file_name"]), image)
    assert [a["bbox"] for a in dicts[0]["annotations"]] == record["bboxes"]
    assert dicts[0]["relations"] == [tuple(relation) for relation in record["relations"]]


def test_load_toy_vrd_splits_differ(small_root):
    test = toy_vrd.load_toy_vrd(str(small_root), "test", num_images=6)
    train = toy_vrd.load_toy_vrd(str(small_root), "train", num_images=6)
    assert all(a["annotations"] != b["annotations"] for a, b in zip(test, train))


def test_load_toy_vrd_unknown_split_raises(tmp_path):
    with pytest.raises(ValueError, match="no split 'val'; use one of train, test"):
        toy_vrd.load_toy_vrd(str(tmp_path), "val")


def test_toy_vrd_is_registered():
    for name in ("toy_vrd_train", "toy_vrd_test"):
        assert name in DatasetCatalog.list()
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == CLASSES
        assert metadata.predicate_classes == PREDICATES
        assert metadata.evaluator_type == "relation"


def _count_drawn(monkeypatch, root, **options):
    """Return how many images a load draws."""
    calls = []
    draw = toy_vrd.draw_toy_image
    monkeypatch.setattr(toy_vrd, "draw_toy_image", lambda *a: calls.append(a) or draw(*a))
    dicts = toy_vrd.load_toy_vrd(str(root), "test", **{"num_images": 6, **options})
    assert all(os.path.isfile(record["file_name"]) for record in dicts)
    return len(calls)


def test_load_toy_vrd_complete_folder_is_kept(small_root, monkeypatch):
    assert _count_drawn(monkeypatch, small_root) == 0


@pytest.mark.parametrize(
    "damage", ["image", "empty image", "annotations", "half", "version", "count"]
)
def test_load_toy_vrd_stale_folder_is_redrawn(small_root, monkeypatch, damage):
    folder = small_root / "toy_vrd" / "test"
    annotations = folder / "annotations.json"
    if damage == "image":
        (folder / "00003.png").unlink()
    elif damage == "empty image":
        (folder / "00003.png").write_bytes(b"")
    elif damage == "annotations":
        annotations.unlink()
    elif damage == "half":
        annotations.write_text(annotations.read_text()[:100])
    elif damage == "version":
        content = json.loads(annotations.read_text())
        content["manifest"]["generator_version"] -= 1
        annotations.write_text(json.dumps(content))
    count = 7 if damage == "count" else 6
    assert _count_drawn(monkeypatch, small_root, num_images=count) == count
    assert len(list(folder.glob("*.png"))) == count
    assert not list(folder.parent.glob(".test.*")), "temporary folders are left behind"


def test_load_toy_vrd_interrupted_keeps_old_folder(small_root, monkeypatch):
    def stop(seed, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_vrd, "draw_toy_image", stop)
    with pytest.raises(KeyboardInterrupt):
        toy_vrd.load_toy_vrd(str(small_root), "test", num_images=7)
    monkeypatch.undo()
    assert _count_drawn(monkeypatch, small_root) == 0


def test_load_toy_vrd_concurrent_loads_draw_once(tmp_path, monkeypatch):
    calls = []
    draw = toy_vrd.draw_toy_image
    monkeypatch.setattr(toy_vrd, "draw_toy_image", lambda *a: calls.append(a) or draw(*a))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(toy_vrd.load_toy_vrd, str(tmp_path), "train", 8) for _ in range(4)]
        results = [job.result() for job in jobs]
    assert len(calls) == 8
    assert all(result == results[0] for result in results)


def test_toy_vrd_is_cached_in_fvcore_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(toy_vrd, "_SPLITS", {"test": (1, 2)})
    dicts = DatasetCatalog.get("toy_vrd_test")
    assert dicts[0]["file_name"] == str(tmp_path / "toy_vrd" / "test" / "00001.png")
    assert os.path.isfile(dicts[0]["file_name"])
