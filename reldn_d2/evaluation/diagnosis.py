"""Recognize predictions in another frame, with other ids, or with exchanged ends.

Such predictions are valid one by one; only their distribution shows that a whole file or a whole
model is wrong. Shapes: R predicted boxes, N annotated boxes, Q candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..structures.boxes_np import pairwise_iou
from ..structures.scene_graph import SceneGraph
from .batches import Batch, ImagePair
from .matching import first_ranks

__all__ = ["check_given_entities", "check_not_normalized", "find_misreading"]

_MAX_IMAGES = 200  # sampled, so that a diagnosis takes less than a second
_RECALL_AT = 50
# Another reading is reported if it finds RATIO times as many relations, MORE_RELATIONS and
# MORE_RECALL more: predictions of an untrained model reach that by chance for no reading.
_RATIO, _MORE_RELATIONS, _MORE_RECALL = 3, 10, 0.03

_Change = Callable[[SceneGraph, SceneGraph], SceneGraph]  # of (truth, prediction)


def check_given_entities(task: str, truth: SceneGraph, predicted: SceneGraph, what: str) -> None:
    """Raise unless the entities of a prediction are the annotated ones, as its task says.

    Args:
        task: the boxes are given in ``sgcls``, boxes and classes in ``prdcls``, these and the
            pairs in ``preddet``, nothing in ``sgdet``.
        truth, predicted: of one image. Annotated entities may be missing in the prediction.
        what: file or model and dataset, for the message.

    Raises:
        ValueError: a box differs from all annotated boxes (of its class, unless in ``sgcls``) by
            more than a pixel and more than 1 % of the box's longer side; or, in ``preddet``, a
            triplet is of no annotated pair.
    """
    if task == "sgdet" or len(predicted.boxes) == 0:
        return
    boxes, given = _inside(predicted.boxes, truth), _inside(truth.boxes, truth)
    longer_side = (given[:, 2:] - given[:, :2]).max(axis=1, initial=0)
    difference = np.abs(boxes[:, None] - given[None]).max(axis=2)  # (R, N)
    is_same = difference <= np.maximum(1.0, 0.01 * longer_side) + 1e-3
    message = "on no annotated box"
    if task != "sgcls" and is_same.any(axis=1).all():
        is_same &= predicted.classes[:, None] == truth.classes[None]
        message = "of another class than the annotated box"
    wrong = np.flatnonzero(~is_same.any(axis=1))
    if len(wrong):
        raise ValueError(
            f"{what}, image {truth.image_id!r}: {len(wrong)} of {len(predicted.boxes)} boxes are "
            f"{message}, the first is box {wrong[0]}, "
            f"{np.round(predicted.boxes[wrong[0]], 1).tolist()} of class "
            f"{predicted.classes[wrong[0]]}. In {task} the entities are given; these are "
            "detections: evaluate them as sgdet (--task sgdet, or TEST.RELATIONS.TASK sgdet)."
        )
    if task == "preddet" and len(predicted.pairs):
        ends = is_same[predicted.pairs][:, :, truth.pairs.T]  # (T, 2, 2, M): end, annotated end
        unknown = np.flatnonzero(~(ends[:, 0, 0] & ends[:, 1, 1]).any(axis=1))
        if len(unknown):
            raise ValueError(
                f"{what}, image {truth.image_id!r}: {len(unknown)} of {len(predicted.pairs)} "
                f"triplets are of no annotated pair, the first is triplet {unknown[0]}. In preddet "
                "the pairs are given; evaluate predictions for all pairs as prdcls (--task prdcls)."
            )


def _inside(boxes: np.ndarray, truth: SceneGraph) -> np.ndarray:
    """Clip boxes to the image, as a model does, if its size is known."""
    if truth.image_size is None:
        return boxes
    height, width = truth.image_size
    return boxes.clip(0, [width, height, width, height])


def check_not_normalized(images: Sequence[ImagePair], what: str) -> None:
    """Raise if the predicted boxes of a dataset are divided by the images' sizes.

    Args:
        images: ground truth and prediction of each image.
        what: file or model and dataset, for the message.

    Raises:
        ValueError: nearly all predicted boxes lie within [0, 1], and nearly no annotated box does.
    """
    sample = _spread(images, 5 * _MAX_IMAGES)
    share, annotated = (_share_within_one([pair[i].boxes for pair in sample]) for i in (1, 0))
    if share is not None and annotated is not None and share > 0.95 and annotated < 0.05:
        raise ValueError(
            f"{what}: {100 * share:.0f} % of the predicted boxes lie within [0, 1]: they look "
            "normalized. Boxes are absolute pixels; multiply x by the image's width and y by its "
            "height."
        )


def _share_within_one(boxes: Sequence[np.ndarray]) -> float | None:
    """Return the share of the boxes of positive area that lie within [0, 1]; None without boxes."""
    both = np.concatenate([np.zeros((0, 4)), *boxes])
    both = both[(both[:, 2:] > both[:, :2]).all(axis=1)]
    return float(((both >= 0) & (both <= 1)).all(axis=1).mean()) if len(both) else None


def find_misreading(images: Sequence[ImagePair]) -> str | None:
    """Say how the predictions of a dataset look misread, in one line without a subject.

    If few relations are found, other readings of the boxes, ids and ends are scored on a sample of
    the images. If none is clearly better, the shares of the annotated entities that some predicted
    box covers with IoU >= 0.5, with and without its class, and the share of boxes beyond the image
    tell whether boxes or classes are wrong.

    Args:
        images: ground truth and prediction of each image.

    Returns:
        Text such as "look subject/object exchanged: R@50 1.8 as given, 14.1 if read so (a sample of
        200 images)"; None if the predictions look right, or wrong in no known way.
    """
    sample = [pair for pair in images if len(pair[0].pairs) and len(pair[1].pairs)]
    sample = _spread(sample, _MAX_IMAGES)
    total = sum(len(truth.pairs) for truth, _ in sample)
    given = _num_found(sample)
    if total == 0 or given * _RATIO > total:
        return None  # no other reading can be clearly better
    best_name, best = "", 0
    for name, change in _readings(sample):
        found = _num_found([(truth, change(truth, predicted)) for truth, predicted in sample])
        if found > best:
            best_name, best = name, found
    in_sample = f"a sample of {len(sample)} images"
    gain = best - given
    if best >= _RATIO * given and gain >= _MORE_RELATIONS and gain >= _MORE_RECALL * total:
        return (
            f"look {best_name}: R@{_RECALL_AT} {100 * given / total:.1f} as given, "
            f"{100 * best / total:.1f} if read so ({in_sample})"
        )
    covered, with_class = _coverage(sample)
    beyond = _share_beyond(sample)
    shares = (
        f"they cover {100 * covered:.0f} % of the annotated entities, "
        f"{100 * with_class:.0f} % with their class ({in_sample})"
    )
    if beyond > 0.1:
        return f"are in another frame: {100 * beyond:.0f} % of the boxes leave the image; {shares}"
    if covered >= 0.3 and with_class * _RATIO < covered:
        return f"have other classes than the annotations, or an untrained detector: {shares}"
    return None


def _spread(images: Sequence[ImagePair], count: int) -> list[ImagePair]:
    """Return at most ``count`` images, evenly spread over the dataset."""
    if len(images) <= count:
        return list(images)
    return [images[i] for i in np.linspace(0, len(images) - 1, count).astype(int)]


def _num_found(images: Sequence[ImagePair]) -> int:
    """Return how many relations the best 50 triplets of each image find."""
    batch = Batch(images)
    triplets, relations, _ = batch.candidates()
    ranks = first_ranks(triplets, relations, batch.ranks(None), len(batch.gt_pairs))
    return int((ranks < _RECALL_AT).sum())


def _readings(sample: Sequence[ImagePair]) -> Iterator[tuple[str, _Change]]:
    """Yield what predictions may look like, and the change that undoes it."""
    yield "subject/object exchanged", lambda _, p: replace(p, pairs=p.pairs[:, ::-1])
    for offset, word in ((-1, "too high"), (1, "too low")):
        yield (
            f"as if all predicates were one {word}",
            lambda _, p, offset=offset: replace(p, predicates=_shifted(p.predicates, offset)),
        )
        yield (
            f"as if all classes were one {word}",
            lambda _, p, offset=offset: replace(p, classes=_shifted(p.classes, offset)),
        )
    yield (
        "as if the boxes were [x, y, width, height]",
        lambda _, p: replace(
            p, boxes=np.concatenate([p.boxes[:, :2], p.boxes[:, :2] + p.boxes[:, 2:]], axis=1)
        ),
    )
    yield (
        "as if the boxes were [y1, x1, y2, x2]",
        lambda _, p: replace(p, boxes=p.boxes[:, [1, 0, 3, 2]]),
    )
    yield from _rescaled_readings(sample)


def _shifted(ids: np.ndarray, offset: int) -> np.ndarray:
    """Add an offset to ids; a negative result becomes an id that nothing has."""
    shifted = ids + offset
    return np.where(shifted < 0, int(ids.max(initial=0)) + 2, shifted)


# How an image's size may enter its boxes, if not at all: (height, width) -> (4,) factors.
_FRAMES: dict[str, Callable[[float, float], list[float]]] = {
    "as if all boxes were multiplied by {:.3g}": lambda height, width: [1.0] * 4,
    "resized to images whose long side has {:.0f} pixels": lambda h, w: [max(h, w)] * 4,
    "resized to images whose short side has {:.0f} pixels": lambda h, w: [min(h, w)] * 4,
    "resized to images of {0:.0f} x {0:.0f} pixels": lambda h, w: [w, h, w, h],
}


def _rescaled_readings(sample: Sequence[ImagePair]) -> Iterator[tuple[str, _Change]]:
    """Yield readings of rescaled boxes, each with the most likely factor.

    Triplets with the labels of an annotated relation of their image vote: many of them are that
    relation, so the most frequent ratio of annotated to predicted coordinates is the factor.
    """
    batch = Batch(sample)
    triplets, relations = batch.equal_labels
    if len(triplets) == 0:
        return
    annotated = batch.gt_boxes[batch.gt_pairs[relations]].reshape(-1, 4).sum(axis=1)
    has_sizes = all(truth.image_size is not None for truth, _ in sample)
    for name, of_size in _FRAMES.items() if has_sizes else [next(iter(_FRAMES.items()))]:

        def frame(truth: SceneGraph, of_size=of_size) -> np.ndarray:
            return np.asarray(of_size(*(truth.image_size or (1, 1))), dtype=np.float64)

        frames = np.stack([frame(truth) for truth, _ in sample])[batch.box_image]
        predicted = (batch.boxes * frames)[batch.pairs[triplets]].reshape(-1, 4).sum(axis=1)
        known = (predicted > 0) & (annotated > 0)
        if not known.any():
            continue
        factor = _most_frequent(annotated[known] / predicted[known])
        if abs(factor - 1) < 0.03 and "multiplied" in name:
            continue
        yield (
            name.format(1 / factor),
            lambda t, p, frame=frame, factor=factor: replace(p, boxes=p.boxes * frame(t) * factor),
        )


def _most_frequent(ratios: np.ndarray) -> float:
    """Return the center of the densest 3 % of positive ratios."""
    logarithms = np.sort(np.log(ratios))
    ends = np.searchsorted(logarithms, logarithms + 0.03, side="right")
    start = int(np.argmax(ends - np.arange(len(logarithms))))
    return float(np.exp(np.median(logarithms[start : ends[start]])))


def _coverage(images: Sequence[ImagePair]) -> tuple[float, float]:
    """Return the shares of annotated entities that a predicted box covers: any, of their class."""
    total = covered = with_class = 0
    for truth, predicted in images:
        overlaps = pairwise_iou(truth.boxes, predicted.boxes) >= 0.5
        same_class = truth.classes[:, None] == predicted.classes[None]
        total += len(truth.boxes)
        covered += int(overlaps.any(axis=1).sum())
        with_class += int((overlaps & same_class).any(axis=1).sum())
    return covered / max(total, 1), with_class / max(total, 1)


def _share_beyond(images: Sequence[ImagePair]) -> float:
    """Return the share of predicted boxes that leave their image by more than a pixel."""
    beyond = total = 0
    for truth, predicted in images:
        if truth.image_size is not None:
            distance = np.abs(predicted.boxes - _inside(predicted.boxes, truth))
            beyond += int((distance > 1).any(axis=1).sum())
            total += len(predicted.boxes)
    return beyond / max(total, 1)
