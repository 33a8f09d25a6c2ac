"""Instance and pairing accuracy: by hand, and against plain loops over the definitions."""

import math

import numpy as np
import pytest
from evaluation_utils import ground_truth, loop_iou, loop_union, prediction

from reldn_d2.evaluation.batches import Batch, batches
from reldn_d2.evaluation.confusion import ConfusionCounter, DistinctEntities

PERSON, CUP, DRUM = 0, 1, 2
HOLDS, ON = 0, 1


def confusion_report(images, predicates_per_pair=None, topk=100):
    counter = ConfusionCounter([predicates_per_pair], topk)
    for batch in batches(images):
        counter.add(batch)
    return counter.report(predicates_per_pair)


def report(gt, triplets, boxes=None, classes=None, **options):
    """Confusion report of one image; the ground truth's boxes unless others are given."""
    boxes = gt.boxes if boxes is None else boxes
    classes = gt.classes if classes is None else classes
    return confusion_report([(gt, prediction(boxes, classes, triplets))], **options)


# One person, three cups; the first cup is held.
CUPS = ground_truth(
    [[0, 0, 20, 40], [20, 0, 25, 5], [30, 0, 35, 5], [40, 0, 45, 5]],
    [PERSON, CUP, CUP, CUP],
    [(0, 1, HOLDS)],
)
# Two persons side by side, each with an instrument, which may differ in class.
PLAYERS = ground_truth(
    [[0, 0, 10, 20], [30, 0, 40, 20], [8, 5, 22, 15], [18, 5, 32, 15]],
    [PERSON, PERSON, DRUM, CUP],
    [(0, 2, HOLDS), (1, 3, HOLDS)],
)


def test_instance_accuracy_true_cup_must_come_first():
    right = report(CUPS, [(0, 1, HOLDS, 0.9), (0, 2, HOLDS, 0.8), (0, 3, ON, 0.95)])
    assert right["instance_accuracy"] == right["instance_accuracy_object"] == 100.0
    assert right["instance_cases"] == right["instance_cases_object"] == 1
    assert right["instance_cases_subject"] == 0 and math.isnan(right["instance_accuracy_subject"])
    assert right["pairing_cases"] == 0 and math.isnan(right["pairing_accuracy"])
    for triplets in (
        [(0, 1, HOLDS, 0.8), (0, 3, HOLDS, 0.9)],  # another cup first
        [(0, 1, HOLDS, 0.8), (0, 2, HOLDS, 0.8)],  # a tie is wrong
        [(0, 1, ON, 0.9)],  # the pair, but not with this predicate
        [],
    ):
        assert report(CUPS, triplets)["instance_accuracy"] == 0.0


def test_instance_accuracy_leaves_out_annotated_rivals():
    two_held = ground_truth(CUPS.boxes, CUPS.classes, [(0, 1, HOLDS), (0, 2, HOLDS)])
    triplets = [(0, 1, HOLDS, 0.8), (0, 2, HOLDS, 0.9), (0, 3, HOLDS, 0.85)]
    result = report(two_held, triplets)
    assert result["instance_cases"] == 2 and result["instance_accuracy"] == 50.0
    all_held = ground_truth(CUPS.boxes, CUPS.classes, [(0, i, HOLDS) for i in (1, 2, 3)])
    assert report(all_held, triplets)["instance_cases"] == 0  # nothing left to confuse


def test_instance_accuracy_subject_side_mirrors_object_side():
    mirrored = ground_truth(CUPS.boxes, CUPS.classes, [(1, 0, ON)])
    result = report(mirrored, [(1, 0, ON, 0.9), (2, 0, ON, 0.8)])
    assert result["instance_accuracy_subject"] == 100.0 and result["instance_cases_subject"] == 1
    assert result["instance_cases_object"] == 0
    assert report(mirrored, [(1, 0, ON, 0.7), (2, 0, ON, 0.8)])["instance_accuracy"] == 0.0


def test_instance_accuracy_subject_is_no_rival_of_its_own_object():
    # Cup on cup: the only other cup is the subject itself.
    stacked = ground_truth([[0, 0, 5, 5], [0, 4, 5, 9]], [CUP, CUP], [(0, 1, ON)])
    assert report(stacked, [(0, 1, ON, 0.9)])["instance_cases"] == 0


def test_instance_accuracy_detected_box_belongs_to_best_overlapping_entity():
    boxes = [[0, 0, 20, 38], [21, 0, 25, 5], [20, 0, 25, 4], [31, 0, 35, 5], [0, 50, 9, 60]]
    classes = [PERSON, CUP, CUP, CUP, CUP]
    # Two detections of the true cup: the better triplet counts. The stray box belongs to nothing.
    triplets = [(0, 1, HOLDS, 0.3), (0, 2, HOLDS, 0.9), (0, 3, HOLDS, 0.8), (0, 4, HOLDS, 0.99)]
    assert report(CUPS, triplets, boxes, classes)["instance_accuracy"] == 100.0
    assert report(CUPS, triplets[:1] + triplets[2:], boxes, classes)["instance_accuracy"] == 0.0
    # Under another class the box belongs to nothing, either.
    classes[2] = DRUM
    assert report(CUPS, triplets, boxes, classes)["instance_accuracy"] == 0.0


def test_confusion_counter_only_the_best_triplets_count():
    triplets = [(0, 3, ON, 0.95), (0, 1, HOLDS, 0.9)]
    assert report(CUPS, triplets, topk=1)["instance_accuracy"] == 0.0
    assert report(CUPS, triplets, topk=2)["instance_accuracy"] == 100.0
    two = [(0, 1, ON, 0.95), (0, 1, HOLDS, 0.9)]
    assert report(CUPS, two, predicates_per_pair=1)["instance_accuracy"] == 0.0
    assert report(CUPS, two, predicates_per_pair=2)["instance_accuracy"] == 100.0


def test_pairing_accuracy_by_hand():
    true = [(0, 2, HOLDS, 0.9), (1, 3, HOLDS, 0.8)]
    result = report(PLAYERS, true + [(0, 3, HOLDS, 0.7), (1, 2, HOLDS, 0.7)])
    assert result["pairing_accuracy"] == 100.0 and result["pairing_cases"] == 2
    # (0, 3) above the second: only the first is right.
    result = report(PLAYERS, true + [(0, 3, HOLDS, 0.85)])
    assert result["pairing_accuracy"] == 50.0
    # Swapped altogether, or a tie: none is.
    assert report(PLAYERS, [(0, 3, HOLDS, 0.9), (1, 2, HOLDS, 0.9)])["pairing_accuracy"] == 0.0
    result = report(PLAYERS, true + [(0, 3, HOLDS, 0.9), (1, 2, HOLDS, 0.9)])
    assert result["pairing_accuracy"] == 0.0


def test_pairing_accuracy_cases_need_a_pair_nearby():
    far = PLAYERS.boxes.copy()
    far[[1, 3], ::2] += 100
    assert report(ground_truth(far, PLAYERS.classes, PLAYERS.relations), [])["pairing_cases"] == 0
    touching = PLAYERS.boxes.copy()  # the enclosing boxes share an edge and no area
    touching[2, 2] = touching[3, 0] = 20
    edge = ground_truth(touching, PLAYERS.classes, PLAYERS.relations)
    assert report(edge, [])["pairing_cases"] == 0


def test_pairing_cases_need_the_same_predicate_and_subject_class():
    near = PLAYERS
    assert report(near, [])["pairing_cases"] == 2
    other_predicate = ground_truth(near.boxes, near.classes, [(0, 2, HOLDS), (1, 3, ON)])
    assert report(other_predicate, [])["pairing_cases"] == 0
    other_class = ground_truth(near.boxes, [PERSON, CUP, DRUM, DRUM], near.relations)
    assert report(other_class, [])["pairing_cases"] == 0
    # Both swapped pairs annotated as well: nothing is left to confuse.
    all_pairs = [(s, o, HOLDS) for s in (0, 1) for o in (2, 3)]
    assert report(ground_truth(near.boxes, near.classes, all_pairs), [])["pairing_cases"] == 0
    # "Next to" in both directions shares its entities: no case.
    mutual = ground_truth(near.boxes, [PERSON] * 4, [(0, 1, ON), (1, 0, ON)])
    assert report(mutual, [])["pairing_cases"] == 0


def test_distinct_entities_annotated_twice_are_one():
    gt = ground_truth(
        np.concatenate([CUPS.boxes, CUPS.boxes[1:2], CUPS.boxes[1:2]]),
        [PERSON, CUP, CUP, CUP, CUP, DRUM],  # the last: the same box under another class
        [(0, 4, HOLDS), (0, 1, HOLDS), (0, 5, HOLDS), (4, 1, ON)],
    )
    merged = DistinctEntities(Batch([(gt, prediction([], [], []))]))
    assert merged.classes.tolist() == [PERSON, CUP, CUP, CUP, DRUM]
    assert merged.relations.tolist() == [[0, 1, HOLDS], [0, 4, HOLDS]]
    result = report(gt, [(0, 4, HOLDS, 0.9), (0, 2, HOLDS, 0.5)])
    assert result["instance_cases"] == 1 and result["instance_accuracy"] == 100.0


def test_confusion_counter_no_images_or_empty_images_gives_nan():
    empty = ground_truth([], [], [])
    for images in (
        [],
        [(empty, prediction([], [], []))],
        [(empty, prediction([[0, 0, 1, 1]], [0], []))],
    ):
        result = confusion_report(images)
        assert result["instance_cases"] == result["pairing_cases"] == 0
        assert math.isnan(result["instance_accuracy"]) and math.isnan(result["pairing_accuracy"])


# Oracle: the definitions as loops over sets and dicts.


def loop_report(gt, boxes, classes, triplets):
    """(right, cases) of object side, subject side and pairing."""
    entities, number = [], {}
    for index, (c, box) in enumerate(zip(gt.classes.tolist(), gt.boxes.tolist())):
        if (c, box) not in entities:
            entities.append((c, box))
        number[index] = entities.index((c, box))
    relations = {(number[s], number[o], p) for s, o, p in gt.relations.tolist()}
    relations = {r for r in relations if r[0] != r[1]}
    owner = {}
    for index, (c, box) in enumerate(zip(classes, boxes)):
        best = 0.0
        for entity, (entity_class, entity_box) in enumerate(entities):
            overlap = loop_iou(box, entity_box)
            if c == entity_class and overlap >= 0.5 and overlap > best:
                owner[index], best = entity, overlap
    scores = {}
    for s, o, p, score in triplets:
        if s in owner and o in owner:
            key = (owner[s], owner[o], p)
            scores[key] = max(scores.get(key, -math.inf), score)

    def score(s, o, p):
        return scores.get((s, o, p), -math.inf)

    counts = {"object": [0, 0], "subject": [0, 0], "pairing": [0, 0]}

    def count(name, relation, rivals):
        rivals = [r for r in rivals if r not in relations]
        if rivals:
            counts[name][1] += 1
            counts[name][0] += all(score(*relation) > score(*r) for r in rivals)

    for s, o, p in relations:
        others = range(len(entities))
        same_object = [e for e in others if entities[e][0] == entities[o][0] and e not in (s, o)]
        same_subject = [e for e in others if entities[e][0] == entities[s][0] and e not in (s, o)]
        count("object", (s, o, p), [(s, e, p) for e in same_object])
        count("subject", (s, o, p), [(e, o, p) for e in same_subject])
        swapped = []
        for s2, o2, p2 in relations:
            near = loop_iou(
                loop_union(entities[s][1], entities[o][1]),
                loop_union(entities[s2][1], entities[o2][1]),
            )
            if p2 == p and len({s, o, s2, o2}) == 4 and entities[s][0] == entities[s2][0] and near:
                swapped += [(s, o2, p), (s2, o, p)]
        count("pairing", (s, o, p), swapped)
    return counts


def random_image(rng):
    def boxes(count):
        low = rng.integers(0, 9, (count, 2))
        return np.concatenate([low, low + rng.integers(1, 5, (count, 2))], axis=1)

    num_gt, num_pred = rng.integers(0, 8), rng.integers(0, 10)
    gt_boxes, gt_classes = boxes(num_gt), rng.integers(0, 2, num_gt)
    if num_gt > 2 and rng.random() < 0.3:
        gt_boxes[2] = gt_boxes[0]
    relations = []
    for _ in range(rng.integers(0, 7) if num_gt > 1 else 0):
        relations.append((*rng.choice(num_gt, 2, replace=False), rng.integers(0, 2)))
    if rng.random() < 0.5:  # boxes given
        pred_boxes, pred_classes = gt_boxes.copy(), gt_classes.copy()
    else:
        pred_boxes, pred_classes = boxes(num_pred), rng.integers(0, 2, num_pred)
        for index in range(num_pred if num_gt else 0):
            if rng.random() < 0.8:
                source = rng.integers(0, num_gt)
                pred_boxes[index], pred_classes[index] = gt_boxes[source], gt_classes[source]
                pred_boxes[index, 2:] += rng.integers(0, 2)
    triplets = []
    for _ in range(rng.integers(0, 30) if len(pred_boxes) > 1 else 0):
        pair = rng.choice(len(pred_boxes), 2, replace=False).tolist()
        triplets.append((*pair, int(rng.integers(0, 2)), float(rng.choice([0.25, 0.5, 0.75]))))
    for s, o, p in relations if len(pred_boxes) == num_gt else ():
        if rng.random() < 0.6:
            triplets.append((int(s), int(o), int(p), float(rng.choice([0.5, 0.75, 1.0]))))
    triplets = list({t[:3]: t for t in reversed(triplets)}.values())[::-1]  # no copies
    return ground_truth(gt_boxes, gt_classes, relations), pred_boxes, pred_classes, triplets


def test_confusion_counter_random_images_equal_loops():
    rng = np.random.default_rng(0)
    images = []
    keys = {"object": ("instance", "_object"), "subject": ("instance", "_subject")}
    keys["pairing"] = ("pairing", "")
    total = {name: [0, 0] for name in keys}
    for _ in range(600):
        gt, boxes, classes, triplets = random_image(rng)
        expected = loop_report(gt, boxes.tolist(), classes.tolist(), triplets)
        result = report(gt, triplets, boxes, classes)
        for name, (prefix, suffix) in keys.items():
            right, cases = expected[name]
            assert result[f"{prefix}_cases{suffix}"] == cases
            wanted = 100 * right / cases if cases else math.nan
            np.testing.assert_allclose(result[f"{prefix}_accuracy{suffix}"], wanted)
            total[name][0] += right
            total[name][1] += cases
        images.append((gt, prediction(boxes, classes, triplets)))
    assert all(0 < right < cases for right, cases in total.values())
    whole = confusion_report(images)
    instance = [a + b for a, b in zip(total["object"], total["subject"])]
    assert whole["instance_cases"] == instance[1] and whole["pairing_cases"] == total["pairing"][1]
    assert whole["instance_accuracy"] == pytest.approx(100 * instance[0] / instance[1])
    assert whole["pairing_accuracy"] == pytest.approx(
        100 * total["pairing"][0] / total["pairing"][1]
    )
