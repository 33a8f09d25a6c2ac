"""Pairs of entities: which ones exist, which ground truth they match, and their union boxes.

Shapes: N images, R entities of one image (of the batch in :class:`EntityBatch`), M ground-truth
relations, Q pairs, U union boxes, C predicates, d values per ROI vector.
Boxes are XYXY in absolute pixels; all boxes of one call share one coordinate frame.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detectron2.structures import Boxes, pairwise_iou

from ...structures.box_ops import boxes_overlap

__all__ = [
    *("EntityBatch", "PairBatch", "PairGrid"),
    *("candidate_pairs", "check_logits", "distinct_unions", "distinct_unions_of_both_orders"),
    "match_pairs",
]


# Overlap of a ground-truth box with itself: above every IoU, so that no other box, however close,
# comes before it.
_SAME_ENTITY = 2.0


def candidate_pairs(boxes: Tensor, overlap_filter: bool, exempt: Tensor | None = None) -> Tensor:
    """Find all ordered pairs (i, j), i != j, that a relation may hold between.

    Under tracing the number of entities is not written into the graph.

    Args:
        boxes: (R, 4).
        overlap_filter: leave out pairs whose boxes do not overlap (IoU > 0).
        exempt: (R,) bool, boxes whose pairs are not filtered; None means no box.

    Returns:
        (R, R) bool; row: subject, column: object.
    """
    index = torch.arange(boxes.shape[0], device=boxes.device)
    candidates = index[:, None] != index[None]
    if overlap_filter:
        kept = boxes_overlap(boxes[:, None], boxes[None])
        if exempt is not None:
            kept = kept | exempt[:, None] | exempt[None]
        candidates = candidates & kept
    return candidates


def check_logits(logits: Tensor, source: str, num_pairs: int, num_predicates: int) -> Tensor:
    """Return logits of pairs whose shape is right.

    Args:
        logits: what a user's method returned.
        source: class and name of that method.
        num_pairs: P, the pairs that it scored.
        num_predicates: C.

    Raises:
        ValueError: if the shape is another one than (P, C + 1); names ``source``.
    """
    expected = (num_pairs, num_predicates + 1)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        returned = f"a {type(logits).__name__}"
        if isinstance(logits, Tensor):
            returned = f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"{source} returned {returned} for {num_pairs} pairs and {num_predicates} predicates: "
            f'return {expected}, the last logit of a pair being "no relationship".'
        )
    return logits


def distinct_unions(
    subjects: Tensor, objects: Tensor, image: Tensor, num_entities: int, num_images: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Find the distinct union boxes of pairs: (i, j) and (j, i) have the same one.

    The number of union boxes per image is read on the host, in one transfer.

    Args:
        subjects, objects: (Q,) int64 in ``[0, num_entities)``, indices over the whole batch.
        image: (num_entities,) int64, non-decreasing: the image of each entity.
        num_entities, num_images: of the batch.

    Returns:
        (U,) and (U,) indices of both entities of each union box, image by image; (Q,) the index of
        each pair's union box; the number of union boxes of each image.
    """
    # torch.unique would do, but it synchronizes with the device once more. So: sort the ids of the
    # unordered pairs; each id that differs from the one before it is a new union box.
    low, high = torch.minimum(subjects, objects), torch.maximum(subjects, objects)
    ids, order = (low * num_entities + high).sort()
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[1:] = ids[1:] != ids[:-1]
    sorted_union = is_new.cumsum(0) - 1  # of each pair, in the order of the ids
    images = image[torch.div(ids, max(num_entities, 1), rounding_mode="floor")]
    counts = images.new_zeros(num_images).scatter_add_(0, images, is_new.long()).tolist()
    distinct = ids.new_empty(sum(counts)).scatter_(0, sorted_union, ids)
    first = torch.div(distinct, max(num_entities, 1), rounding_mode="floor")
    second = distinct - first * num_entities
    union_of_pair = torch.empty_like(sorted_union).scatter_(0, order, sorted_union)
    return first, second, union_of_pair, counts


def distinct_unions_of_both_orders(
    subjects: Tensor, objects: Tensor, num_entities: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the distinct union boxes of pairs in one image, for any number of pairs when traced.

    Args:
        subjects, objects: (Q,) int64; with each pair (i, j), (j, i) must be among them.
        num_entities: of the image.

    Returns:
        (U,) and (U,) indices of both entities of each union box; (Q,) the index of each pair's
        union box.
    """
    is_first = (subjects < objects).nonzero()[:, 0]
    first, second = subjects[is_first], objects[is_first]
    low, high = torch.minimum(subjects, objects), torch.maximum(subjects, objects)
    table = subjects.new_zeros(num_entities * num_entities)
    table = table.scatter(
        0, first * num_entities + second, torch.arange(first.shape[0], device=first.device)
    )
    return first, second, table[low * num_entities + high]


@dataclass
class PairGrid:
    """Candidates and labels of each ordered pair of an image's entities, as dense (R, R) tables.

    Attributes:
        candidates: (R, R) bool, pairs that may be sampled: as positive or as negative ones.
        match: (R, R) int64, each pair's row in ``label_sets``; M for a negative pair.
        label_sets: (M + 1, C) bool; row m is the label set of the ground-truth pair of relation m,
            the last row is empty.
        is_subject: (R,) bool, the entity matches a ground-truth subject.
        is_object: (R,) bool, the entity matches a ground-truth object.
        annotated: (R, R) bool, pairs of ground-truth boxes with an annotated relation.
    """

    candidates: Tensor
    match: Tensor
    label_sets: Tensor
    is_subject: Tensor
    is_object: Tensor
    annotated: Tensor

    @property
    def positive(self) -> Tensor:
        """Return the candidates that match a ground-truth relation, (R, R) bool."""
        return self.candidates & (self.match < len(self.label_sets) - 1)

    @property
    def negative(self) -> Tensor:
        """Return the candidates that match no ground-truth relation, (R, R) bool."""
        return self.candidates & (self.match == len(self.label_sets) - 1)


def _label_sets(
    gt_pairs: Tensor, gt_predicates: Tensor, num_predicates: int, gt_kept: Tensor | None
) -> Tensor:
    """Collect the kept predicates of each relation's pair: (M + 1, C) bool, the last row empty."""
    same_pair = (gt_pairs[:, None] == gt_pairs[None]).all(dim=2)
    one_hot = gt_pairs.new_zeros((len(gt_pairs), num_predicates), dtype=torch.float32)
    one_hot.scatter_(1, gt_predicates[:, None], 1.0)
    if gt_kept is not None:
        one_hot = one_hot * gt_kept[:, None]
    sets = same_pair.to(one_hot.dtype) @ one_hot > 0
    return torch.cat([sets, sets.new_zeros((1, num_predicates))])


def match_pairs(
    entities: tuple[Boxes, Tensor],
    targets: tuple[Boxes, Tensor],
    gt_pairs: Tensor,
    gt_predicates: Tensor,
    *,
    num_predicates: int,
    gt_index: Tensor | None = None,
    gt_kept: Tensor | None = None,
    overlap_filter: bool = False,
    iou_threshold: float = 0.5,
) -> PairGrid:
    """Match every pair of entities with the ground-truth relations (section 4 of the paper).

    A pair's overlap with a relation is ``min(IoU(subject, gt subject), IoU(object, gt object))``,
    and 0 if a class differs. The pair is positive if its highest overlap is at least
    ``iou_threshold``; its label set is all predicates of the best matching ground-truth pair.
    A ground-truth box matches itself best, even if another one has the same box and class.

    Args:
        entities: R boxes and (R,) classes.
        targets: ground-truth boxes and classes.
        gt_pairs: (M, 2) subject and object index into the targets.
        gt_predicates: (M,) predicates.
        num_predicates: C.
        gt_index: (R,) int64, the target that an entity is, -1 for a proposal; None if all are
            proposals.
        gt_kept: (M,) bool, the relations that are trained on; None means all. A pair whose best
            matching ground-truth pair has none of them is left out: it is related, so it must
            not be an example of "no relationship" either.
        overlap_filter: see :func:`candidate_pairs`; pairs with a ground-truth box are exempt.
        iou_threshold: minimum overlap of a positive pair.
    """
    boxes, classes = entities
    if gt_index is None:
        gt_index = torch.full_like(classes, -1)
    candidates = candidate_pairs(boxes.tensor, overlap_filter, exempt=gt_index >= 0)
    sets = _label_sets(gt_pairs, gt_predicates, num_predicates, gt_kept)
    num_entities, num_relations = len(boxes), len(gt_pairs)
    if num_relations == 0 or num_entities == 0:
        none = torch.zeros(num_entities, dtype=torch.bool, device=boxes.device)
        match = torch.full_like(candidates, num_relations, dtype=torch.int64)
        return PairGrid(candidates, match, sets, none, none, torch.zeros_like(candidates))

    target_boxes, target_classes = targets
    iou = pairwise_iou(boxes, target_boxes) * (classes[:, None] == target_classes[None])
    target_index = torch.arange(len(target_boxes), device=boxes.device)
    iou = iou.masked_fill(gt_index[:, None] == target_index[None], _SAME_ENTITY)
    as_subject, as_object = iou[:, gt_pairs[:, 0]], iou[:, gt_pairs[:, 1]]
    overlap, match = torch.minimum(as_subject[:, None], as_object[None]).max(dim=2)
    match = match.masked_fill(overlap < iou_threshold, num_relations)
    if gt_kept is not None:
        candidates = candidates & (sets.any(dim=1)[match] | (match == num_relations))
    return PairGrid(
        candidates=candidates,
        match=match,
        label_sets=sets,
        is_subject=(as_subject >= iou_threshold).any(dim=1),
        is_object=(as_object >= iou_threshold).any(dim=1),
        annotated=overlap == _SAME_ENTITY,  # both ends are the relation's own
    )


@dataclass
class EntityBatch:
    """Entities of all images of a batch, concatenated; each is encoded once.

    Attributes:
        boxes: (R, 4).
        classes: (R,) int64.
        image: (R,) int64, index of the entity's image.
        image_sizes: (N, 2) height and width.
        sizes: number of entities of each of the N images.
        subject_vectors, object_vectors: (R, d), or None if no module reads them.
        context: (R, X), what an entity context says of each entity; None without one.
    """

    boxes: Tensor
    classes: Tensor
    image: Tensor
    image_sizes: Tensor
    sizes: list[int]
    subject_vectors: Tensor | None
    object_vectors: Tensor | None
    context: Tensor | None = None

    @property
    def vectors(self) -> Tensor | None:
        """Return (R, d) or (R, 2 d), the vectors of each entity in one; None if there are none."""
        parts = [x for x in (self.subject_vectors, self.object_vectors) if x is not None]
        return torch.cat(parts, dim=1) if parts else None

    @classmethod
    def stack(
        cls,
        boxes: list[Boxes],
        classes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        subject_vectors: Tensor | None = None,
        object_vectors: Tensor | None = None,
    ) -> "EntityBatch":
        """Concatenate the entities of all images.

        Args:
            boxes, classes, image_sizes: one per image; image sizes are (height, width).
            subject_vectors, object_vectors: of all entities, in the same order.
        """
        sizes = [len(x) for x in boxes]
        stacked = torch.cat([x.tensor for x in boxes])
        # Values from the host are filled in, because copying a tensor waits for the device.
        image = stacked.new_empty(len(stacked), dtype=torch.int64)
        for index, of_image in enumerate(image.split(sizes)):
            of_image.fill_(index)
        height_and_width = stacked.new_empty(len(sizes), 2)
        for row, size in zip(height_and_width, image_sizes):
            for value, side in zip(row, size):
                value.fill_(side)
        return cls(
            boxes=stacked,
            classes=torch.cat(classes),
            image=image,
            image_sizes=height_and_width,
            sizes=sizes,
            subject_vectors=subject_vectors,
            object_vectors=object_vectors,
        )


@dataclass
class PairBatch:
    """Pairs of entities that are scored, and their union boxes, which are encoded on demand.

    Attributes:
        subjects, objects: (Q,) int64, indices into the entities of the batch.
        encode_unions: returns (U, d) vectors of the distinct union boxes and (Q,) int64, each
            pair's union box; None instead of the latter if U = Q, pair by pair. None if the union
            boxes are not encoded.
    """

    subjects: Tensor
    objects: Tensor
    encode_unions: Callable[[], tuple[Tensor, Tensor | None]] | None = None

    def union_vectors(self) -> Tensor:
        """Encode the union box of each pair: (Q, d)."""
        vectors, union = self.encode_unions()
        return vectors if union is None else vectors[union]
