"""Ground truth and predictions of many images as flat arrays.

A dataset is processed in batches of images: large enough for numpy to be fast, small enough that
memory does not grow with the dataset. Every consumer of an evaluation takes what it needs from a
batch, which computes each array once.

Shapes: R predicted boxes, N annotated boxes, K predicted triplets, M annotated relations, Q
candidates (a triplet and a relation of one image with equal labels).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..structures.boxes_np import aligned_iou, phrase_boxes
from ..structures.ranking import rank_in_group
from ..structures.scene_graph import SceneGraph
from ..utils.protocols import OVERLAPS

__all__ = ["NEVER", "Batch", "ImagePair", "RelationTable", "batches", "equal_codes"]

ImagePair = tuple[SceneGraph, SceneGraph]  # ground truth and prediction of one image
NEVER = np.iinfo(np.int64).max  # the rank of a relation that is not found
_IMAGES_PER_BATCH = 1000
_MAX_CLASSES = 2**31


class RelationTable(NamedTuple):
    """The annotated relations of several images."""

    image: np.ndarray  # (M,) index of the image
    labels: np.ndarray  # (M, 3) subject class, predicate, object class
    num_images: int

    @property
    def predicates(self) -> np.ndarray:
        """(M,) predicates alone."""
        return self.labels[:, 1]

    @classmethod
    def concatenate(cls, tables: Sequence["RelationTable"]) -> "RelationTable":
        """Return one table of all images, in their order."""
        counts = [table.num_images for table in tables]
        images = [table.image + start for table, start in zip(tables, _starts(counts))]
        return cls(_stack(images), _stack([table.labels for table in tables], 3), sum(counts))


@dataclass(frozen=True)
class Batch:
    """Ground truth and predictions of consecutive images, one after the other."""

    images: Sequence[ImagePair]
    _overlaps: dict[str, np.ndarray] = field(default_factory=dict)  # (Q,) by kind of overlap

    @cached_property
    def boxes(self) -> np.ndarray:
        """(R, 4) predicted boxes."""
        return np.concatenate([np.zeros((0, 4)), *(p.boxes for _, p in self.images)])

    @cached_property
    def classes(self) -> np.ndarray:
        """(R,) classes of the predicted boxes."""
        return _stack([p.classes for _, p in self.images])

    @cached_property
    def box_image(self) -> np.ndarray:
        """(R,) image of each predicted box, as an index into the batch."""
        return _owners([len(p.boxes) for _, p in self.images])

    @cached_property
    def image(self) -> np.ndarray:
        """(K,) image of each triplet, as an index into the batch."""
        return _owners([len(p.pairs) for _, p in self.images])

    @cached_property
    def pairs(self) -> np.ndarray:
        """(K, 2) indices into all predicted boxes of the batch."""
        starts = _starts([len(p.boxes) for _, p in self.images])
        return _stack([p.pairs for _, p in self.images], 2) + starts[self.image][:, None]

    @cached_property
    def scores(self) -> np.ndarray:
        """(K,) float64."""
        return np.concatenate([np.zeros(0), *(p.scores for _, p in self.images)])

    @cached_property
    def labels(self) -> np.ndarray:
        """(K, 3) subject class, predicate, object class."""
        predicates = _stack([p.predicates for _, p in self.images])
        return _labels(self.classes, self.pairs, predicates)

    @cached_property
    def gt_boxes(self) -> np.ndarray:
        """(N, 4) annotated boxes."""
        return np.concatenate([np.zeros((0, 4)), *(gt.boxes for gt, _ in self.images)])

    @cached_property
    def gt_classes(self) -> np.ndarray:
        """(N,) classes of the annotated boxes."""
        return _stack([gt.classes for gt, _ in self.images])

    @cached_property
    def gt_box_image(self) -> np.ndarray:
        """(N,) image of each annotated box, as an index into the batch."""
        return _owners([len(gt.boxes) for gt, _ in self.images])

    @cached_property
    def gt_pairs(self) -> np.ndarray:
        """(M, 2) indices into all annotated boxes of the batch."""
        starts = _starts([len(gt.boxes) for gt, _ in self.images])
        owners = _owners([len(gt.pairs) for gt, _ in self.images])
        return _stack([gt.pairs for gt, _ in self.images], 2) + starts[owners][:, None]

    @cached_property
    def truth(self) -> RelationTable:
        """The annotated relations; images are indices into the batch."""
        predicates = _stack([gt.predicates for gt, _ in self.images])
        labels = _labels(self.gt_classes, self.gt_pairs, predicates)
        image = _owners([len(gt.pairs) for gt, _ in self.images])
        return RelationTable(image, labels, len(self.images))

    @cached_property
    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,) and (M,) int64, equal where the image and all three labels are equal."""
        highest = [table.max(axis=0, initial=0) + 1 for table in (self.labels, self.truth.labels)]
        sizes = np.maximum(*highest).astype(np.int64)

        def encode(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
            code = image
            for column in range(3):
                code = code * sizes[column] + labels[:, column]
            return code

        if len(self.images) * float(np.prod(sizes, dtype=np.float64)) > 2.0**62:
            raise ValueError(f"{sizes.tolist()} labels are too many to tell them apart by int64.")
        return encode(self.image, self.labels), encode(self.truth.image, self.truth.labels)

    @cached_property
    def equal_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """(Q,) triplets and (Q,) relations of one image with equal labels, whatever their boxes."""
        return equal_codes(*self.codes)

    def candidates(
        self, overlap: str = "relationship", strict: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which triplets match which relations by labels and boxes.

        Args:
            overlap: ``relationship``: the smaller of the subject boxes' and the object boxes' IoU;
                ``phrase``: the IoU of the boxes that enclose subject and object.
            strict: the overlap must be > 0.5 instead of >= 0.5.

        Returns:
            (Q,) triplet, (Q,) relation and (Q,) overlap, sorted by triplet, then by relation.
        """
        if overlap not in OVERLAPS:
            raise ValueError(f"Unknown overlap {overlap!r}; expected one of {', '.join(OVERLAPS)}.")
        triplets, relations = self.equal_labels
        if overlap not in self._overlaps:
            boxes, gt_boxes = self.boxes, self.gt_boxes
            pairs, gt_pairs = self.pairs[triplets], self.gt_pairs[relations]
            if overlap == "phrase":
                values = aligned_iou(phrase_boxes(boxes, pairs), phrase_boxes(gt_boxes, gt_pairs))
            else:
                subjects, objects = (
                    aligned_iou(boxes[pairs[:, side]], gt_boxes[gt_pairs[:, side]])
                    for side in (0, 1)
                )
                values = np.minimum(subjects, objects)
            self._overlaps[overlap] = values
        values = self._overlaps[overlap]
        enough = values > 0.5 if strict else values >= 0.5
        return triplets[enough], relations[enough], values[enough]

    @cached_property
    def _rank_in_pair(self) -> np.ndarray:
        return rank_in_group(self.pairs[:, 0] * len(self.boxes) + self.pairs[:, 1])

    def ranks(
        self, predicates_per_pair: int | None, considered: np.ndarray | None = None
    ) -> np.ndarray:
        """Rank the triplets of each image, after each pair has kept its k best predicates.

        Args:
            predicates_per_pair: k; None means no limit.
            considered: (K,) bool, the triplets that count at all; equal for all of one pair.

        Returns:
            (K,) int64, from 0; :data:`NEVER` for triplets that are left out.
        """
        kept = np.ones(len(self.image), dtype=bool)
        if predicates_per_pair:
            kept = self._rank_in_pair < predicates_per_pair
        if considered is not None:
            kept = kept & considered
        running = np.cumsum(kept)
        starts = np.searchsorted(self.image, np.arange(len(self.images)))
        before = np.concatenate([[0], running])[starts]
        return np.where(kept, running - 1 - before[self.image], NEVER)

    def judgeable(self, rule: str | None) -> np.ndarray | None:
        """Return (K,) bool, whether it is known if the triplet's two classes are in its image.

        It is if both are positive or verified there, or if one is negative.

        Args:
            rule: ``text``, as the OpenImages challenge describes it: classes of the annotated boxes
                are positive, other classes that are verified to be absent are negative. ``code``,
                as its evaluation code does: only classes of the relations are positive, and all
                other verified classes are negative, whether verified to be absent or present.
                None: every triplet counts.

        Returns:
            None if every triplet counts.
        """
        if rule is None:
            return None
        truths = [gt for gt, _ in self.images]
        verified = _image_class_codes([gt.verified[:, 0] for gt in truths])
        if rule == "code":
            ends = self.truth.image[:, None] * _MAX_CLASSES + self.truth.labels[:, ::2]
            positive, negative = ends.reshape(-1), verified
        else:
            positive = self.gt_box_image * _MAX_CLASSES + self.gt_classes
            negative = _image_class_codes([gt.verified[gt.verified[:, 1] == 0, 0] for gt in truths])
        negative = np.setdiff1d(negative, positive)
        codes = self.image[:, None] * _MAX_CLASSES + self.labels[:, ::2]
        known = np.isin(codes, np.union1d(positive, verified)).all(axis=1)
        return known | np.isin(codes, negative).any(axis=1)


def batches(images: Sequence[ImagePair], size: int = _IMAGES_PER_BATCH) -> Iterator[Batch]:
    """Yield the images in batches of ``size``."""
    for start in range(0, len(images), size):
        yield Batch(images[start : start + size])


def equal_codes(codes: np.ndarray, gt_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all combinations of an element of each array that are equal.

    Args:
        codes: (K,) integers.
        gt_codes: (M,) integers.

    Returns:
        (Q,) indices into ``codes`` and (Q,) into ``gt_codes``, sorted by the former, then by the
        latter.
    """
    order = np.argsort(gt_codes, kind="stable")
    ordered = gt_codes[order]
    first = np.searchsorted(ordered, codes, side="left")
    counts = np.searchsorted(ordered, codes, side="right") - first
    left = np.repeat(np.arange(len(codes)), counts)
    offset = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
    return left, order[np.repeat(first, counts) + offset]


def _stack(arrays: Sequence[np.ndarray], width: int = 0) -> np.ndarray:
    """Concatenate integer arrays as int64, also if there is none."""
    shape = (0, width) if width else (0,)
    return np.concatenate([np.zeros(shape, dtype=np.int64), *arrays]).astype(np.int64, copy=False)


def _labels(classes: np.ndarray, pairs: np.ndarray, predicates: np.ndarray) -> np.ndarray:
    return np.stack([classes[pairs[:, 0]], predicates, classes[pairs[:, 1]]], axis=1)


def _image_class_codes(classes: Sequence[np.ndarray]) -> np.ndarray:
    return _owners([len(x) for x in classes]) * _MAX_CLASSES + _stack(classes)


def _owners(counts: Sequence[int]) -> np.ndarray:
    """Repeat each index as often as its count says: [2, 0, 1] -> [0, 0, 2]."""
    return np.repeat(np.arange(len(counts)), np.asarray(counts, dtype=np.int64))


def _starts(counts: Sequence[int]) -> np.ndarray:
    """Return where each part begins: [2, 0, 1] -> [0, 2, 2]."""
    return np.cumsum([0, *counts])[: len(counts)]
