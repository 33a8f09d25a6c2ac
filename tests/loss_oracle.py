"""Eq 1 to 7 in plain loops, one anchor, one group, one pair at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides

SIDES = ("subject", "object")


def all_pairs(sizes: Sequence[int]) -> dict:
    """The ordered pairs of images with these numbers of entities; both sides take all of them.

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
    """The case as ``contrastive_losses`` wants it, from ``classes`` (A,) and ``sampled`` (2, P)."""
    ends = torch.stack([case["subjects"], case["objects"]])
    return AnchorSides(case["sampled"], ends, case["classes"][ends.flip(0)])


def _smallest(pairs: list[int], value: list[float]) -> int:
    """The first of equal ones."""
    best = pairs[0]
    for p in pairs[1:]:
        if value[p] < value[best]:
            best = p
    return best


def _largest(pairs: list[int], value: list[float]) -> int:
    """The last of equal ones."""
    best = pairs[0]
    for p in pairs[1:]:
        if value[p] >= value[best]:
            best = p
    return best


def groups_in_loops(case: dict, logits: Tensor, side: str, image: int) -> list[dict[int, list]]:
    """For L1, L2, L3: anchor -> its groups with a positive, each as (positives, negatives)."""
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
    """L1, L2, L3: the mean over images of the sum of both sides.

    Args:
        case: what :func:`all_pairs` gives, ``labels`` (P, C), ``classes`` (A,), ``sampled`` (2, P).
        logits: (P, C + 1).
        alphas: margins asked for.
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
                        low, high = _smallest(positive, value), _largest(negative, value)
                        slack = alphas[i] - (phi[low] - phi[high])  # Eq 2, 4, 6
                        if slack > 0:  # Eq 3, 5, 7
                            total = total + slack / (len(groups) if normalization == "paper" else 1)
                count = max(len(groups_of), 1) if normalization == "paper" else num_margins + 1
                losses[i] = losses[i] + total / count / case["num_images"]
    return losses
