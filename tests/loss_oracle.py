"""Loop oracle of the contrastive losses: Eq 1 to 7, one anchor, one group, one pair at a time.

Shapes: A entities of the batch, P pairs, C predicates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides

SIDES = ("subject", "object")


def all_pairs(sizes: Sequence[int]) -> dict:
    """Build the ordered pairs of images of given sizes.

    Args:
        sizes: number of entities of each image.

    Returns:
        ``subjects``, ``objects`` (P,), ``anchor_image`` (A,), ``num_images``.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pairs = [
        (start + i, start + j)
        for start, size in zip(starts, sizes)
        for i in range(size)
        for j in range(size)
        if i != j
    ]
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    images = [image for image, size in enumerate(sizes) for _ in range(size)]
    return {
        "subjects": table[:, 0],
        "objects": table[:, 1],
        "anchor_image": torch.tensor(images, dtype=torch.int64),
        "num_images": len(sizes),
    }


def anchor_sides(case: dict) -> AnchorSides:
    """Build the sides of a case from its ``classes`` (A,) and ``sampled`` (2, P)."""
    ends = torch.stack([case["subjects"], case["objects"]])
    return AnchorSides(case["sampled"], ends, case["classes"][ends.flip(0)])


def _lowest(pairs: list[int], phi: list[float]) -> int:
    """Return the pair with the smallest affinity; of equal ones the first."""
    lowest = pairs[0]
    for p in pairs[1:]:
        if phi[p] < phi[lowest]:
            lowest = p
    return lowest


def _highest(pairs: list[int], phi: list[float]) -> int:
    """Return the pair with the largest affinity; of equal ones the last."""
    highest = pairs[0]
    for p in pairs[1:]:
        if phi[p] >= phi[highest]:
            highest = p
    return highest


def groups_in_loops(case: dict, logits: Tensor, side: str, image: int) -> list[dict[int, list]]:
    """Find the groups that have a positive, per anchor, for L1, L2 and L3.

    Returns:
        For each loss a dict from anchor to its groups, each as (positives, negatives).
    """
    labels = [{e for e, on in enumerate(row) if on} for row in case["labels"].tolist()]
    predicted = [max(range(len(row) - 1), key=lambda e, row=row: row[e]) for row in logits.tolist()]
    anchors, others = case["subjects"].tolist(), case["objects"].tolist()
    if side == "object":
        anchors, others = others, anchors
    sampled = case["sampled"][SIDES.index(side)].tolist()
    classes = case["classes"].tolist()
    result: list[dict[int, list]] = [{}, {}, {}]
    for anchor, its_image in enumerate(case["anchor_image"].tolist()):
        if its_image != image:
            continue
        pairs = [p for p in range(len(labels)) if anchors[p] == anchor and sampled[p]]
        positive = [p for p in pairs if labels[p]]  # V+
        negative = [p for p in pairs if not labels[p]]  # V-
        if not positive:
            continue
        result[0][anchor] = [(positive, negative)]
        result[1][anchor] = [
            (
                [p for p in positive if classes[others[p]] == c],
                [p for p in negative if classes[others[p]] == c],
            )
            for c in sorted({classes[others[p]] for p in positive})
        ]
        result[2][anchor] = [
            (
                [p for p in positive if e in labels[p]],
                [p for p in negative if predicted[p] == e],
            )
            for e in sorted(set().union(*(labels[p] for p in positive)))
        ]
    return result


def contrastive_in_loops(
    case: dict,
    logits: Tensor,
    alphas: Sequence[float] = (0.2, 0.2, 0.2),
    normalization: str = "paper",
) -> list[Tensor]:
    """Compute L1, L2 and L3, each the mean over images of the sum of both sides.

    Args:
        case: result of :func:`all_pairs` with ``labels`` (P, C), ``classes`` (A,) and ``sampled``
            (2, P).
        logits: (P, C + 1).
        alphas: required margins.
        normalization: "paper" or "released_code".
    """
    phi = 1 - logits.softmax(dim=1)[:, -1]  # Eq 1
    value = phi.tolist()
    losses = [logits.sum() * 0.0 for _ in alphas]
    for image in range(case["num_images"]):
        for side in SIDES:
            for i, groups_of in enumerate(groups_in_loops(case, logits, side, image)):
                total, num_margins = 0.0, 0
                for groups in groups_of.values():
                    for positive, negative in groups:
                        if not negative:
                            continue
                        num_margins += 1
                        lowest_positive = _lowest(positive, value)
                        hardest_negative = _highest(negative, value)
                        margin = phi[lowest_positive] - phi[hardest_negative]  # Eq 2, 4, 6
                        slack = alphas[i] - margin
                        if slack > 0:  # Eq 3, 5, 7
                            total = total + slack / (len(groups) if normalization == "paper" else 1)
                count = max(len(groups_of), 1) if normalization == "paper" else num_margins + 1
                losses[i] = losses[i] + total / count / case["num_images"]
    return losses
