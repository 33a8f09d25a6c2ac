"""Predictions in another frame, with shifted ids or exchanged ends are recognized."""

import logging
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from evaluation_data import NAME, dataset_dicts, output, registered, run
from evaluation_utils import ground_truth, prediction

from reldn_d2.evaluation import RelationEvaluator
from reldn_d2.evaluation.diagnosis import (
    check_given_entities,
    check_not_normalized,
    find_misreading,
)


def images(count=60, seed=0):
    """Photographs of several sizes with six entities and four relations, found in most cases.

    Most predicted triplets are wrong, and the predicates are as unevenly frequent as real ones.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        width, height = rng.integers(300, 900, 2).tolist()
        low = rng.random((6, 2)) * [0.6 * width, 0.6 * height]
        side = (0.08 + 0.3 * rng.random((6, 2))) * [width, height]
        boxes = np.concatenate([low, low + side], axis=1)
        classes = np.minimum(rng.geometric(0.1, 6), 40)
        relations = []
        for _ in range(4):
            subject, object_ = rng.choice(6, 2, replace=False).tolist()
            relations.append((subject, object_, int(min(rng.geometric(0.08), 60))))
        truth = replace(
            ground_truth(boxes, classes, relations), image_size=(int(height), int(width))
        )
        rows = {relation: 0.5 + 0.5 * rng.random() for relation in relations}
        for _ in range(70):
            subject, object_ = rng.choice(6, 2, replace=False).tolist()
            row = (subject, object_, int(min(rng.geometric(0.08), 60)))
            rows.setdefault(row, rng.random())
        noise = 1 + 0.02 * rng.standard_normal((6, 4))
        triplets = [(*row, score) for row, score in rows.items()]
        pairs.append((truth, prediction(boxes * noise, classes, triplets)))
    return pairs


def changed(change):
    return [(truth, change(truth, predicted)) for truth, predicted in images()]


def sides(truth):
    height, width = truth.image_size
    return np.array([width, height] * 2)


MISREADINGS = {
    "subject/object exchanged": lambda t, p: replace(p, pairs=p.pairs[:, ::-1]),
    "as if all predicates were one too high": lambda t, p: replace(p, predicates=p.predicates + 1),
    "as if all predicates were one too low": lambda t, p: replace(p, predicates=p.predicates - 1),
    "as if all classes were one too high": lambda t, p: replace(p, classes=p.classes + 1),
    "as if all classes were one too low": lambda t, p: replace(p, classes=p.classes - 1),
    r"as if the boxes were \[x, y, width, height\]": lambda t, p: replace(
        p, boxes=np.concatenate([p.boxes[:, :2], p.boxes[:, 2:] - p.boxes[:, :2]], axis=1)
    ),
    r"as if the boxes were \[y1, x1, y2, x2\]": lambda t, p: replace(
        p, boxes=p.boxes[:, [1, 0, 3, 2]]
    ),
    r"as if all boxes were multiplied by 0\.(80|79|81)": lambda t, p: replace(
        p, boxes=p.boxes * 0.8
    ),
    r"as if all boxes were multiplied by 1\.2[456]": lambda t, p: replace(p, boxes=p.boxes * 1.25),
    r"as if all boxes were multiplied by 2": lambda t, p: replace(p, boxes=p.boxes * 2),
    r"images whose long side has (50|51|52)\d pixels": lambda t, p: replace(
        p, boxes=p.boxes * 512 / max(t.image_size)
    ),
    r"images whose long side has 10[123]\d pixels": lambda t, p: replace(
        p, boxes=p.boxes * 1024 / max(t.image_size)
    ),
    r"images whose short side has (79|80|81)\d pixels": lambda t, p: replace(
        p, boxes=p.boxes * 800 / min(t.image_size)
    ),
    r"images of (9[89]|10[012])\d+ x (9[89]|10[012])\d+ pixels": lambda t, p: replace(
        p, boxes=p.boxes * 1000 / sides(t)
    ),
}


@pytest.mark.parametrize("message", MISREADINGS)
def test_find_misreading_names_it(message):
    found = find_misreading(changed(MISREADINGS[message]))
    pattern = r"look .*: R@50 \d+\.\d as given, \d+\.\d if read so \(a sample of 60 images\)"
    assert found and re.search(message, found) and re.fullmatch(pattern, found), found


def test_find_misreading_right_predictions_give_none():
    assert find_misreading(images()) is None
    assert find_misreading([]) is None
    assert find_misreading(changed(lambda t, p: p.select(slice(0)))) is None


@pytest.mark.parametrize("seed", range(5))
def test_find_misreading_untrained_predicates_give_none(seed):
    rng = np.random.default_rng(seed)

    def at_random(truth, predicted):
        return replace(predicted, predicates=rng.integers(0, 60, len(predicted.predicates)))

    assert find_misreading(changed(at_random)) is None


def test_find_misreading_other_classes_or_frame():
    permutation = np.random.default_rng(0).permutation(50)
    found = find_misreading(changed(lambda t, p: replace(p, classes=permutation[p.classes])))
    assert "have other classes than the annotations, or an untrained detector: they cover" in found

    rng = np.random.default_rng(0)

    def moved(truth, predicted):  # by another distance in each image
        return replace(predicted, boxes=predicted.boxes + rng.uniform(300, 900))

    found = find_misreading(changed(moved))
    assert "are in another frame: " in found and "% of the boxes leave the image" in found


def test_find_misreading_takes_a_sample():
    pairs = images(100) * 50
    start = time.process_time()
    exchanged = [(t, replace(p, pairs=p.pairs[:, ::-1])) for t, p in pairs]
    begin = time.process_time()
    assert "a sample of 200 images" in find_misreading(exchanged)
    assert time.process_time() - begin < 10 and begin - start < 60


def test_check_not_normalized_names_the_data_set():
    normalized = changed(lambda t, p: replace(p, boxes=p.boxes / sides(t)))
    with pytest.raises(ValueError, match="^file: 100 % .* within .0, 1.: they look normalized"):
        check_not_normalized(normalized, "file")
    check_not_normalized(images(), "file")
    check_not_normalized([], "file")
    # Annotations in that frame are something that `check` reports.
    both = [(replace(t, boxes=t.boxes / sides(t)), p) for t, p in normalized]
    check_not_normalized(both, "file")


@pytest.mark.parametrize("task", ["sgcls", "prdcls", "preddet"])
def test_check_given_entities(task):
    truth, predicted = images(1)[0]
    predicted = predicted.select(slice(0)) if task == "preddet" else predicted
    with pytest.raises(ValueError, match=f"what, image 'image': . of 6 boxes are on no.*In {task}"):
        check_given_entities(task, truth, replace(predicted, boxes=predicted.boxes + 9), "what")
    check_given_entities("sgdet", truth, replace(predicted, boxes=predicted.boxes + 9), "what")
    for boxes in (truth.boxes, truth.boxes.round(), np.floor(truth.boxes), truth.boxes * 1.0001):
        check_given_entities(task, truth, replace(predicted, boxes=boxes), "what")
    some = replace(predicted, boxes=truth.boxes[:2], classes=truth.classes[:2])
    check_given_entities(task, truth, some, "what")
    classes = replace(predicted, boxes=truth.boxes, classes=truth.classes + 1)
    if task == "sgcls":
        check_given_entities(task, truth, classes, "what")
    else:
        with pytest.raises(ValueError, match="6 of 6 boxes are of another class .*--task sgdet"):
            check_given_entities(task, truth, classes, "what")


def test_check_given_entities_preddet_pair_that_is_not_annotated_raises():
    truth, predicted = images(1)[0]
    predicted = replace(predicted, boxes=truth.boxes, classes=truth.classes)
    annotated = {tuple(pair) for pair in truth.pairs.tolist()}
    is_annotated = [tuple(pair) in annotated for pair in predicted.pairs.tolist()]
    first = is_annotated.index(False)
    message = f"{is_annotated.count(False)} of .* triplets are of no .*first is triplet {first}"
    with pytest.raises(ValueError, match=message):
        check_given_entities("preddet", truth, predicted, "what")
    check_given_entities("prdcls", truth, predicted, "what")
    check_given_entities("preddet", truth, predicted.select(np.flatnonzero(is_annotated)), "what")


def test_check_given_entities_boxes_clipped_to_the_image():
    truth, predicted = images(1)[0]
    beyond = replace(truth, boxes=truth.boxes + [0, 0, 900, 0])
    clipped = replace(predicted, boxes=beyond.boxes.clip(0, sides(truth)))
    check_given_entities("prdcls", beyond, clipped, "what")


@pytest.mark.parametrize("task", ["sgcls", "prdcls", "preddet", "sgdet"])
def test_evaluator_detections_are_no_given_entities(task):
    with registered():
        evaluator = RelationEvaluator(NAME, task=task)
        record = dataset_dicts()[0]
        result = output(record, record["relations"])
        result["instances"].pred_boxes.tensor[:, 2] += 6
        evaluator.process([record], [result])
        if task == "sgdet":
            assert evaluator.evaluate()
        else:
            message = f"Predictions for dataset '{NAME}', image 'a_1.jpg': 5 of 5 boxes"
            with pytest.raises(ValueError, match=message):
                evaluator.evaluate()


def test_evaluator_normalized_boxes_raise_and_misreading_warns(tmp_path, caplog):
    with registered():
        evaluator = RelationEvaluator(NAME, str(tmp_path))
        record = dataset_dicts()[0]
        result = output(record, record["relations"])
        result["instances"].pred_boxes.tensor /= 80
        evaluator.process([record], [result])
        with pytest.raises(ValueError, match=f"Predictions for dataset '{NAME}': 100 %.*normali"):
            evaluator.evaluate()
        assert not list(tmp_path.iterdir())

    def many():
        return [dict(r, image_id=f"{i}_{r['image_id']}") for i in range(9) for r in dataset_dicts()]

    with registered(many):
        evaluator = RelationEvaluator(NAME)
        for record in many():
            triplets = [(o, s, p) for s, o, p in record["relations"]]
            evaluator.process([record], [output(record, triplets)])
        with caplog.at_level(logging.WARNING):
            evaluator.evaluate()
        message = f"The predictions for '{NAME}' look subject/object exchanged: R@50 0.0 as given, "
        assert message in caplog.text
        caplog.clear()
        run(RelationEvaluator(NAME), only=[])
        assert "look" not in caplog.text
