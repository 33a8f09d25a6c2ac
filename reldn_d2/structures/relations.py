"""Relations of one image: the only place that defines their fields.

Shapes: R entities (boxes), M ground-truth relations, K predicted relations.

All fields of one :class:`detectron2.structures.Instances` have one length, so the relations of an
image are an ``Instances`` of their own that points into the image's entities by index:

=================  ===========  ====================================================================
ground truth       shape        meaning
=================  ===========  ====================================================================
``gt_pairs``       (M, 2)       subject index, object index into the image's ``instances``
``gt_predicates``  (M,)         predicate in ``[0, num_predicates)``
``gt_kept``        (M,) bool    optional: False for a relation that is not trained on this time;
                                its pair is not a negative one either
=================  ===========  ====================================================================

====================  ===========  =================================================================
prediction            shape        meaning
====================  ===========  =================================================================
``pairs``             (K, 2)       subject index, object index into the image's ``instances``
``predicates``        (K,)         predicate in ``[0, num_predicates)``
``scores``            (K,)         ``p_det(s) * p(pred | s, o) * p_det(o)``, in descending order
``predicate_scores``  (K,)         ``p(pred | s, o)``
====================  ===========  =================================================================
"""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor

from detectron2.structures import Instances

__all__ = [
    "TASKS",
    "check_relation_triplets",
    "ground_truth_relations",
    "predicted_relations",
    "relation_problems",
    "remap_relations",
]

# Given at test time: nothing; the boxes; boxes and classes; these and the annotated pairs.
TASKS = ("sgdet", "sgcls", "prdcls", "preddet")

_PAIR_FIELDS = ("gt_pairs", "pairs")


def check_relation_triplets(
    triplets: Iterable[Sequence[int]],
    num_entities: int,
    num_predicates: int | None = None,
    where: str = "relations",
) -> None:
    """Raise if an index of a relation is out of range, or subject and object are the same.

    Args:
        triplets: ``(subject_index, object_index, predicate_id)``, 0-based.
        num_entities: number of annotations that the indices point into.
        num_predicates: number of predicates; not checked when None.
        where: file and image, for messages.

    Raises:
        ValueError: with ``where``, the index and content of the relation, and how to fix it.
    """
    for problem in relation_problems(triplets, num_entities, num_predicates, where):
        raise ValueError(problem)


def relation_problems(
    triplets: Iterable[Sequence[int]],
    num_entities: int,
    num_predicates: int | None = None,
    where: str = "relations",
) -> Iterator[str]:
    """Yield everything that :func:`check_relation_triplets` would raise, one per relation."""
    for index, triplet in enumerate(triplets):
        place = f"{where}: relation {index} is {triplet!r:.80}"
        if not isinstance(triplet, Sequence) or len(triplet) != 3:
            yield f"{place}; expected (subject_index, object_index, predicate_id)."
            continue
        if not all(isinstance(x, Integral) for x in triplet):
            yield f"{place}; expected three integers: (subject_index, object_index, predicate_id)."
            continue
        subject, object_, predicate = triplet
        outside = [
            (role, entity)
            for role, entity in (("subject", subject), ("object", object_))
            if not 0 <= entity < num_entities
        ]
        if outside:
            role, entity = outside[0]
            yield (
                f"{place}, but its {role} index {entity} is outside the {num_entities} "
                "annotations of this image. Indices are 0-based positions in `annotations`: fix or "
                "remove this relation."
            )
        elif subject == object_:
            yield (
                f"{place}, which relates annotation {subject} to itself. Fix or remove this "
                "relation."
            )
        elif predicate < 0 or (num_predicates is not None and predicate >= num_predicates):
            yield (
                f"{place}, but predicate {predicate} is outside the {num_predicates} predicates "
                "(0-based) of this dataset."
            )


def ground_truth_relations(
    triplets: Sequence[Sequence[int]], image_size: tuple[int, int]
) -> Instances:
    """Create the ground-truth relations of one image.

    Args:
        triplets: M tuples ``(subject_index, object_index, predicate_id)``.
        image_size: (height, width) of the frame of the entities' boxes.
    """
    table = torch.as_tensor(triplets, dtype=torch.int64).reshape(-1, 3)
    relations = Instances(image_size)
    relations.gt_pairs = table[:, :2].contiguous()
    relations.gt_predicates = table[:, 2].contiguous()
    return relations


def predicted_relations(
    image_size: tuple[int, int],
    pairs: Tensor,
    predicates: Tensor,
    scores: Tensor,
    predicate_scores: Tensor,
) -> Instances:
    """Create the predicted relations of one image; see the module docstring for shapes."""
    relations = Instances(image_size)
    relations.pairs = pairs
    relations.predicates = predicates
    relations.scores = scores
    relations.predicate_scores = predicate_scores
    return relations


def remap_relations(
    relations: Instances, kept: Tensor, image_size: tuple[int, int] | None = None
) -> Instances:
    """Drop the relations of dropped entities, and remap the indices of the others.

    Args:
        relations: ground truth or prediction, with indices into R entities.
        kept: (R,) bool, True if the entity is kept. The order of the entities does not change.
        image_size: (height, width) of the result; defaults to that of ``relations``.

    Returns:
        A new ``Instances`` whose indices point into the kept entities.
    """
    field = next(name for name in _PAIR_FIELDS if relations.has(name))
    pairs = relations.get(field)
    kept = kept.to(device=pairs.device, dtype=torch.bool)
    new_index = kept.long().cumsum(0) - 1
    stays = kept[pairs].all(dim=1)
    chosen = relations[stays]
    result = Instances(image_size or relations.image_size)
    for name, value in chosen.get_fields().items():
        result.set(name, new_index[value] if name == field else value)
    return result
