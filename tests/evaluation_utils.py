"""What the tests of the evaluation share: small images, loops over them, random datasets."""

import logging
import runpy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from reldn_d2.structures.scene_graph import SceneGraph

from detectron2.utils.logger import setup_logger

TOOL = Path(__file__).resolve().parents[1] / "tools/evaluate_relations.py"


def ground_truth(boxes, classes, relations, verified=()):
    table = np.asarray(relations, dtype=np.int64).reshape(-1, 3)
    return SceneGraph(
        image_id="image",
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        classes=np.asarray(classes, dtype=np.int64),
        pairs=table[:, :2],
        predicates=table[:, 2],
        verified=np.asarray(list(verified), dtype=np.int64).reshape(-1, 2),
    )


def prediction(boxes, classes, triplets, image_id="image"):
    """Triplets are (subject, object, predicate, score)."""
    return SceneGraph.from_arrays(
        image_id,
        boxes,
        classes,
        np.ones(len(boxes)),
        [t[:2] for t in triplets],
        [t[2] for t in triplets],
        [t[3] for t in triplets],
    )


def run_tool(arguments):
    """Exit status of tools/evaluate_relations.py, which leaves no loggers behind."""
    logger = logging.getLogger("reldn_d2")
    before = logger.propagate, list(logger.handlers), logger.level
    setup_logger.cache_clear()
    try:
        return runpy.run_path(str(TOOL))["main"]([str(x) for x in arguments])
    except SystemExit as end:
        return end.code
    finally:
        logger.propagate, logger.handlers, logger.level = before


# Loops over plain numbers, written from the definitions.


def loop_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


def loop_union(a, b):
    return [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]


@dataclass
class Case:
    """One image as plain lists, triplets in the order given."""

    gt_boxes: list
    gt_classes: list
    relations: list  # (subject, object, predicate)
    boxes: list
    classes: list
    triplets: list  # (subject, object, predicate, score)
    verified: dict = field(default_factory=dict)

    def pair(self):
        """The image as the package takes it."""
        return (
            ground_truth(self.gt_boxes, self.gt_classes, self.relations, self.verified.items()),
            prediction(self.boxes, self.classes, self.triplets),
        )

    def gt_labels(self):
        return [(self.gt_classes[s], p, self.gt_classes[o]) for s, o, p in self.relations]

    def overlap(self, kind, triplet, relation):
        subject, object_ = self.boxes[triplet[0]], self.boxes[triplet[1]]
        gt_subject, gt_object = self.gt_boxes[relation[0]], self.gt_boxes[relation[1]]
        if kind == "relationship":
            return min(loop_iou(subject, gt_subject), loop_iou(object_, gt_object))
        return loop_iou(loop_union(subject, object_), loop_union(gt_subject, gt_object))


FEATURES = ("ties", "repeated", "two_classes", "touching", "given", "near", "half")


def random_case(rng, num_gt, num_pred, num_classes, num_predicates, features=FEATURES):
    """Small whole-number boxes, so that exact halves, ties and repetitions abound."""

    def boxes(count):
        low = rng.integers(0, 4, (count, 2))
        if "touching" in features and count:
            low = low // 2 * 2
        size = 2 if "touching" in features else rng.integers(1, 5, (count, 2))
        return np.concatenate([low, low + size], axis=1).tolist()

    gt_boxes, gt_classes = boxes(num_gt), rng.integers(0, num_classes, num_gt).tolist()
    if "two_classes" in features and num_gt > 1:
        gt_boxes[1] = list(gt_boxes[0])
    relations = []
    for _ in range(int(rng.integers(0, 7)) if num_gt > 1 else 0):
        s, o = rng.choice(num_gt, 2, replace=False).tolist()
        relations.append((s, o, int(rng.integers(0, num_predicates))))
    if "repeated" in features and relations:
        relations.append(relations[0])
    owner = list(range(num_gt))  # the entity that a predicted box was made from
    if "given" in features:
        pred_boxes, classes = [list(b) for b in gt_boxes], list(gt_classes)
    else:
        owner = [-1] * num_pred
        pred_boxes, classes = boxes(num_pred), rng.integers(0, num_classes, num_pred).tolist()
        for index in range(num_pred if num_gt and "near" in features else 0):
            if rng.random() < 0.8:
                source = owner[index] = int(rng.integers(0, num_gt))
                pred_boxes[index], classes[index] = list(gt_boxes[source]), gt_classes[source]
                pred_boxes[index][2 if "half" in features else 3] += int(rng.integers(0, 3))
    scores = [0.25, 0.5, 0.75] if "ties" in features else rng.random(50).tolist()
    triplets = []
    for _ in range(int(rng.integers(0, 25)) if len(pred_boxes) > 1 else 0):
        s, o = rng.choice(len(pred_boxes), 2, replace=False).tolist()
        p = int(rng.integers(0, num_predicates))
        triplets.append((s, o, p, scores[int(rng.integers(0, len(scores)))]))
    for s, o, p in relations:
        pair = [i for i in owner if i in (s, o)]
        if rng.random() < 0.6 and s in pair and o in pair:
            score = scores[int(rng.integers(0, len(scores)))]
            triplets.append((owner.index(s), owner.index(o), p, score))
    # A prediction lists no triplet twice: the first copy of each stays.
    triplets = list({t[:3]: t for t in reversed(triplets)}.values())[::-1]
    verified = {c: int(rng.integers(0, 2)) for c in range(num_classes) if rng.random() < 0.5}
    return Case(gt_boxes, gt_classes, relations, pred_boxes, classes, triplets, verified)


@st.composite
def data_sets(draw, num_classes=3, num_predicates=3):
    """A few images; what is in them is drawn, so that a failing case shrinks to few features."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        random_case(
            rng,
            draw(st.integers(0, 6)),
            draw(st.integers(0, 6)),
            draw(st.integers(1, num_classes)),
            num_predicates,
            draw(st.sets(st.sampled_from(FEATURES))),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
