"""Ground truth and predictions of many images as tables, and which rows match.

Shapes: I images, M ground-truth relations, R predicted boxes, K predicted triplets. A data set is
worked off in batches of images, so that the memory does not grow with what a batch needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..structures.ranking import rank_in_group
from .ground_truth import ImagePair
from .matching import (
    NEVER,
    aligned_iou,
    best_candidates,
    equal_codes,
    first_ranks,
    match_one_to_one,
    phrase_boxes,
)

__all__ = [
    "Batch",
    "Detections",
    "KINDS",
    "RelationTable",
    "anything_matches",
    "batches",
    "detections",
    "found_ranks",
]

KINDS = ("relationship", "phrase")
_IMAGES_PER_BATCH = 1000
Key = tuple[int, str]  # predicates per pair, kind of overlap


class RelationTable(NamedTuple):
    """All ground-truth relations of a data set."""

    image: np.ndarray  # (M,) number of the image in the data set
    labels: np.ndarray  # (M, 3) subject class, predicate, object class
    num_images: int

    @property
    def predicates(self) -> np.ndarray:
        """(M,) predicates alone."""
        return self.labels[:, 1]

    @classmethod
    def from_images(cls, images: Sequence[ImagePair]) -> "RelationTable":
        """The relations of all images, in their order."""
        labels = [gt.labels for gt, _ in images if len(gt.pairs)]
        return cls(
            _owners([len(gt.pairs) for gt, _ in images]),
            np.concatenate([np.zeros((0, 3), dtype=np.int64), *labels]),
            len(images),
        )


class Detections(NamedTuple):
    """Triplets that are tested one by one, for average precision."""

    scores: np.ndarray  # (K,) float64
    predicates: np.ndarray  # (K,)
    ranks: np.ndarray  # (K,) in the image, from 0
    matches: np.ndarray  # (K,) ground truth (its number in the data set), or -1


@dataclass(frozen=True)
class Batch:
    """Ground truth and predictions of consecutive images, one after the other."""

    images: Sequence[ImagePair]

    @cached_property
    def boxes(self) -> np.ndarray:
        """(R, 4) predicted boxes."""
        return np.concatenate([np.zeros((0, 4)), *(p.boxes for _, p in self.images)])

    @cached_property
    def classes(self) -> np.ndarray:
        """(R,) their classes."""
        return _stack([p.classes for _, p in self.images])

    @cached_property
    def box_image(self) -> np.ndarray:
        """(R,) their images' numbers in the batch."""
        return _owners([len(p.boxes) for _, p in self.images])

    @cached_property
    def gt_boxes(self) -> np.ndarray:
        """(N, 4) annotated boxes."""
        return np.concatenate([np.zeros((0, 4)), *(gt.boxes for gt, _ in self.images)])

    @cached_property
    def gt_classes(self) -> np.ndarray:
        """(N,) their classes."""
        return _stack([gt.classes for gt, _ in self.images])

    @cached_property
    def gt_box_image(self) -> np.ndarray:
        """(N,) their images' numbers in the batch."""
        return _owners([len(gt.boxes) for gt, _ in self.images])

    @cached_property
    def image(self) -> np.ndarray:
        """(K,) number of each triplet's image in the batch."""
        return _owners([len(p.scores) for _, p in self.images])

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
        subjects, objects = self.classes[self.pairs].T
        return np.stack([subjects, predicates, objects], axis=1)

    @cached_property
    def truth(self) -> RelationTable:
        """The ground truth; image numbers are those in the batch."""
        return RelationTable.from_images(self.images)

    @cached_property
    def gt_pairs(self) -> np.ndarray:
        """(M, 2) indices into all annotated boxes of the batch."""
        starts = _starts([len(gt.boxes) for gt, _ in self.images])
        pairs = [gt.pairs for gt, _ in self.images]
        return _stack(pairs, 2) + starts[self.truth.image][:, None]

    @cached_property
    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,) and (M,) int64 that are equal where image and labels are."""
        highest = [table.max(axis=0, initial=0) + 1 for table in (self.labels, self.truth.labels)]
        sizes = np.maximum(*highest).astype(np.int64)

        def encode(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
            code = image
            for column in range(3):
                code = code * sizes[column] + labels[:, column]
            return code

        if len(self.images) * float(np.prod(sizes, dtype=np.float64)) > 2.0**62:
            raise ValueError(f"{sizes.tolist()} labels are too many to be told apart by int64.")
        return encode(self.image, self.labels), encode(self.truth.image, self.truth.labels)

    @cached_property
    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        return equal_codes(*self.codes)

    def candidates(
        self, kind: str, threshold: float = 0.5, strict: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What may match: (Q,) triplet, (Q,) ground truth and (Q,) overlap.

        Args:
            kind: ``relationship``: the smaller of the subject boxes' and the object boxes' IoU;
                ``phrase``: the IoU of the boxes that enclose subject and object.
            threshold: overlap that is needed.
            strict: ``> threshold`` instead of ``>= threshold``.
        """
        if kind not in KINDS:
            raise ValueError(f"Unknown kind of overlap {kind!r}; known are {', '.join(KINDS)}.")
        triplets, truths = self._candidates
        boxes, gt_boxes = self.boxes, self.gt_boxes
        pairs, gt_pairs = self.pairs[triplets], self.gt_pairs[truths]
        if kind == "phrase":
            overlaps = aligned_iou(phrase_boxes(boxes, pairs), phrase_boxes(gt_boxes, gt_pairs))
        else:
            subjects, objects = (
                aligned_iou(boxes[pairs[:, side]], gt_boxes[gt_pairs[:, side]]) for side in (0, 1)
            )
            overlaps = np.minimum(subjects, objects)
        enough = overlaps > threshold if strict else overlaps >= threshold
        return triplets[enough], truths[enough], overlaps[enough]

    @cached_property
    def _rank_in_pair(self) -> np.ndarray:
        return rank_in_group(self.pairs[:, 0] * len(self.boxes) + self.pairs[:, 1])

    def ranks(self, predicates_per_pair: int, considered: np.ndarray | None = None):
        """Rank of each triplet in its image, from 0, after each pair kept its k best predicates.

        Args:
            predicates_per_pair: k; 0 means all.
            considered: (K,) bool, the triplets that count at all; equal for all of one pair.

        Returns:
            (K,) int64, :data:`NEVER` for the triplets that fell away.
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


def _stack(arrays: Sequence[np.ndarray], width: int = 0) -> np.ndarray:
    """Integer arrays one after the other as int64, also if there is none."""
    shape = (0, width) if width else (0,)
    return np.concatenate([np.zeros(shape, dtype=np.int64), *arrays]).astype(np.int64, copy=False)


def _owners(counts: Sequence[int]) -> np.ndarray:
    """The number of each count, as often as it says: [2, 0, 1] -> [0, 0, 2]."""
    return np.repeat(np.arange(len(counts)), np.asarray(counts, dtype=np.int64))


def _starts(counts: Sequence[int]) -> np.ndarray:
    """Where each part begins: [2, 0, 1] -> [0, 2, 2]."""
    return np.cumsum([0, *counts])[: len(counts)]


def batches(images: Sequence[ImagePair], size: int = _IMAGES_PER_BATCH) -> Iterator[Batch]:
    """The images in batches of ``size``."""
    for start in range(0, len(images), size):
        yield Batch(images[start : start + size])


def found_ranks(
    images: Sequence[ImagePair],
    predicates_per_pair: Sequence[int],
    kinds: Sequence[str] = ("relationship",),
    one_to_one: bool = False,
) -> dict[Key, np.ndarray]:
    """At which rank each ground-truth relation is found; all kinds of recall come from that.

    Args:
        images: ground truth and prediction of every image of the data set.
        predicates_per_pair: the values of k; 0 means all.
        kinds: of :data:`KINDS`.
        one_to_one: each triplet takes one unmatched ground truth (see
            :func:`.matching.match_one_to_one`); else every triplet finds all that it matches.

    Returns:
        for each k and kind (M,) ranks in the image, from 0; :data:`NEVER` where it is not found.
    """
    parts: dict[Key, list] = {(k, kind): [] for k in predicates_per_pair for kind in kinds}
    for batch in batches(images):
        num_truth = len(batch.truth.image)
        for kind in kinds:
            triplets, truths, overlaps = batch.candidates(kind)
            for k in predicates_per_pair:
                ranks = batch.ranks(k)
                used = ranks[triplets] != NEVER
                if one_to_one:
                    matches = match_one_to_one(
                        triplets[used], truths[used], overlaps[used], batch.codes[0], num_truth
                    )
                    matched = np.flatnonzero(matches >= 0)
                    found = first_ranks(matched, matches[matched], ranks, num_truth)
                else:
                    found = first_ranks(triplets[used], truths[used], ranks, num_truth)
                parts[k, kind].append(found)
    return {
        key: np.concatenate([np.zeros(0, dtype=np.int64), *arrays]) for key, arrays in parts.items()
    }


def detections(
    images: Sequence[ImagePair],
    predicates_per_pair: Sequence[int],
    kinds: Sequence[str] = ("relationship",),
    limit: int = 0,
    strict: bool = False,
    verified_labels: bool = False,
) -> dict[Key, Detections]:
    """Every triplet with the best-overlapping ground truth of its labels, taken or not.

    Args:
        images: ground truth and prediction of every image of the data set.
        predicates_per_pair: the values of k; 0 means all.
        kinds: of :data:`KINDS`.
        limit: triplets that count in an image, after k was applied; 0 means all.
        strict: a match needs an overlap > 0.5 instead of >= 0.5.
        verified_labels: leave out the triplets that :func:`_judgeable` says nothing is known of.
    """
    parts: dict[Key, list] = {(k, kind): [] for k in predicates_per_pair for kind in kinds}
    offset = 0
    for batch in batches(images):
        considered = _judgeable(batch) if verified_labels else None
        for kind in kinds:
            triplets, truths, overlaps = batch.candidates(kind, strict=strict)
            matches = best_candidates(triplets, truths, overlaps, len(batch.scores))
            matches = np.where(matches >= 0, matches + offset, -1)
            for k in predicates_per_pair:
                ranks = batch.ranks(k, considered)
                kept = ranks < (limit or NEVER)
                rows = (batch.scores, batch.labels[:, 1], ranks, matches)
                parts[k, kind].append(tuple(row[kept] for row in rows))
        offset += len(batch.truth.image)
    empty = (np.zeros(0), *(np.zeros(0, dtype=np.int64) for _ in range(3)))
    return {
        key: Detections(*(np.concatenate(column) for column in zip(empty, *rows)))
        for key, rows in parts.items()
    }


def _judgeable(batch: Batch) -> np.ndarray:
    """(K,) bool: both classes are annotated or verified in the image, or one verified absent."""
    annotated = _image_class_codes([gt.classes for gt, _ in batch.images])
    verified = _image_class_codes([gt.verified[:, 0] for gt, _ in batch.images])
    absent = _image_class_codes([gt.verified[gt.verified[:, 1] == 0, 0] for gt, _ in batch.images])
    absent = np.setdiff1d(absent, annotated)
    known = np.union1d(annotated, verified)
    codes = batch.image[:, None] * _MAX_CLASSES + batch.labels[:, ::2]
    return np.isin(codes, known).all(axis=1) | np.isin(codes, absent).any(axis=1)


_MAX_CLASSES = 2**31


def _image_class_codes(classes: Sequence[np.ndarray]) -> np.ndarray:
    return _owners([len(x) for x in classes]) * _MAX_CLASSES + _stack(classes)


def anything_matches(images: Sequence[ImagePair]) -> bool:
    """Whether any triplet finds any ground-truth relation."""
    return any(len(batch.candidates("relationship")[0]) for batch in batches(images))
