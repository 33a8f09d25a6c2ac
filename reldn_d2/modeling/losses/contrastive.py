"""The graphical contrastive losses L1, L2, L3 (section 3, Eq 1-7).

Shapes: N images, A entities of the batch, P pairs, C predicates, K entity classes, S sides. Each
entity is an anchor once per side, as subject and as object, so S is 2 and there are S * A anchors.
The last of C + 1 logits is "no relationship".

All three losses have the same form. The pairs of an anchor fall into groups. A group's margin is
its *lowest positive* minus its *hardest negative*: the smallest affinity of its positive members
minus the largest affinity of its negative members (Eq 2, 4, 6). An anchor's loss is the mean hinge
``max(0, alpha - margin)`` over its groups (Eq 3, 5, 7):

====  ====================  ===========================  ==========================================
loss  groups of an anchor   positive members             negative members
====  ====================  ===========================  ==========================================
L1    one                   pairs with a predicate       pairs without
L2    one per class of the  the same                     the same
      other end
L3    one per predicate e   pairs labeled e             pairs without a predicate whose highest
                                                         real predicate is e
====  ====================  ===========================  ==========================================

Subjects and objects as anchors differ only in which end of a pair is the anchor, so both sides go
through the same code together. Nothing is moved to the host. ``tests/loss_oracle.py`` has the same
losses as plain loops over anchors, groups and pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "LOSS_NAMES",
    "NORMALIZATIONS",
    "AnchorSides",
    "ContrastiveGroups",
    "affinity",
    "contrastive_losses",
    "find_groups",
    "group_weights",
]

LOSS_NAMES = ("class_agnostic", "entity_class", "predicate_class")
NORMALIZATIONS = ("paper", "released_code")


def affinity(logits: Tensor) -> Tensor:
    """Compute Eq 1, ``1 - p(no relationship | s, o)``, in float32 or wider.

    Computed as the sum of the other probabilities, because the subtraction from 1 would lose the
    precision of small values.

    Args:
        logits: (P, C + 1).

    Returns:
        (P,) in ``[0, 1]``, up to rounding.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.softmax(dim=1)[:, :-1].sum(dim=1)


@dataclass
class AnchorSides:
    """Pairs of each side of L1-L3, and which end of each pair is the anchor.

    Attributes:
        sampled: (S, P) bool, the pairs that take part.
        anchor: (S, P) int64 in ``[0, A)``: the pair's subject (or object) in the batch.
        other_class: (S, P) int64 in ``[0, K)``: the class of the pair's other end.
    """

    sampled: Tensor
    anchor: Tensor
    other_class: Tensor


@dataclass
class ContrastiveGroups:
    """The groups of L1, L2 and L3, in this order along the first dimension.

    A negative pair is in exactly one group per loss and side, so it is the hardest negative of at
    most one group, and a group's margin is stored in the slot of its hardest negative.

    Attributes:
        is_hardest_negative: (3, S, P) bool, whether the pair is the hardest negative of a group
            that has positive members too.
        lowest_positive: (3, S, P) int64, the pair with the smallest affinity among the positive
            members of that group; any pair where ``is_hardest_negative`` is False.
        num_positive_groups: (3, S, A) float, number of each anchor's groups with positive members.
    """

    is_hardest_negative: Tensor
    lowest_positive: Tensor
    num_positive_groups: Tensor

    def margins(self, phi: Tensor) -> Tensor:
        """Compute ``m`` of Eq 2, 4 and 6 from the (P,) affinities.

        Returns:
            (3, S, P), to be read where ``is_hardest_negative``.
        """
        min_positive = phi.gather(0, self.lowest_positive.flatten()).view_as(self.lowest_positive)
        max_negative = phi  # each pair in the role of the hardest negative of its own group
        return min_positive - max_negative


@torch.no_grad()
def find_groups(
    phi: Tensor,
    predicted: Tensor,
    labels: Tensor,
    sides: AnchorSides,
    num_anchors: int,
    num_classes: int,
) -> ContrastiveGroups:
    """Find the lowest positive and the hardest negative of all groups of L1, L2 and L3.

    The minimum and maximum over a group are taken over ranks instead of affinities: ranks are
    unique, so they also tell *which* pair is the lowest or the hardest.

    Args:
        phi: (P,) affinities, P > 0. Of equal ones the first counts as the smallest.
        predicted: (P,) int64, the highest real predicate.
        labels: (P, C) bool, the label set of each pair; a pair without a label is negative.
        sides: S sides.
        num_anchors: A.
        num_classes: K.
    """
    (num_sides, num_pairs), num_predicates = sides.sampled.shape, labels.shape[1]
    num_rows = num_sides * num_anchors  # one row per anchor and side
    is_positive = labels.any(dim=1)

    # Rank 0 is the pair with the smallest affinity. The lowest positive has the largest reversed
    # rank, so that both extremes are a maximum, and -1 can stand for "no such member".
    by_affinity = phi.argsort(stable=True)
    rank = torch.empty_like(by_affinity)
    rank.scatter_(0, by_affinity, torch.arange(num_pairs, device=phi.device))
    reversed_rank = num_pairs - 1 - rank
    negative_rank = torch.where(sides.sampled & ~is_positive, rank, -1)
    reversed_positive_rank = torch.where(sides.sampled & is_positive, reversed_rank, -1)

    # Group ids: first one group per row (L1), then K per row (L2), then C per row (L3).
    row = sides.anchor + torch.arange(0, num_rows, num_anchors, device=phi.device)[:, None]
    num_groups = [num_rows, num_rows * num_classes, num_rows * num_predicates]
    by_class = num_groups[0] + row * num_classes + sides.other_class
    by_predicted = num_groups[0] + num_groups[1] + row * num_predicates + predicted
    group = torch.stack([row, by_class, by_predicted])  # (3, S, P)

    # for pair in pairs:
    #     hardest[group[pair]] = max(hardest[group[pair]], negative_rank[pair])
    hardest_negative_rank = _max_per_group(group, negative_rank, sum(num_groups))
    lowest_positive_rank = torch.cat(  # reversed ranks
        [
            _max_per_group(group[:2], reversed_positive_rank, num_groups[0] + num_groups[1]),
            _lowest_positive_per_label(labels, reversed_rank, sides.sampled, row, num_rows),
        ]
    )

    has_positive = (lowest_positive_rank >= 0).split(num_groups)
    num_positive_groups = torch.stack(
        [x.view(num_rows, -1).sum(dim=1, dtype=phi.dtype) for x in has_positive]
    )
    is_hardest = (hardest_negative_rank[group] == negative_rank) & (negative_rank >= 0)
    lowest_rank = lowest_positive_rank[group]  # of the pair's group
    return ContrastiveGroups(
        is_hardest_negative=is_hardest & (lowest_rank >= 0),
        lowest_positive=by_affinity.flip(0)[lowest_rank.clamp(min=0)],
        num_positive_groups=num_positive_groups.view(3, num_sides, num_anchors),
    )


def _max_per_group(group: Tensor, rank: Tensor, num_groups: int) -> Tensor:
    """Compute each group's largest rank; -1 for a group without members.

    Args:
        group: (L, S, P) int64 in ``[0, num_groups)``.
        rank: (S, P) int64; -1 for a pair that is no member.
        num_groups: number of groups.
    """
    largest = rank.new_full((num_groups,), -1)
    return largest.scatter_reduce_(0, group.flatten(), rank.expand_as(group).flatten(), "amax")


def _lowest_positive_per_label(
    labels: Tensor, reversed_rank: Tensor, sampled: Tensor, row: Tensor, num_rows: int
) -> Tensor:
    """Find the lowest positives of the groups of L3, where a pair has a group per label.

    Args:
        labels: (P, C) bool.
        reversed_rank: (P,) int64.
        sampled: (S, P) bool.
        row: (S, P) int64 in ``[0, num_rows)``.
        num_rows: number of anchors of all sides.

    Returns:
        (num_rows * C,) int64, the largest reversed rank of each group; -1 for one without members.
    """
    # float32 has the fastest scatter by rows, and tells 2 ** 24 ranks apart.
    rank_of_label = reversed_rank.float()[:, None].where(labels, -1.0)  # (P, C)
    lowest = rank_of_label.new_full((num_rows + 1, labels.shape[1]), -1.0)
    # for pair, e in labels:
    #     lowest[row[pair], e] = max(lowest[row[pair], e], reversed_rank[pair])
    for rows in torch.where(
        sampled, row, num_rows
    ):  # per side; unsampled pairs go to a last row, which is dropped
        lowest.scatter_reduce_(0, rows[:, None].expand_as(rank_of_label), rank_of_label, "amax")
    return lowest[:-1].flatten().long()


@torch.no_grad()
def group_weights(
    groups: ContrastiveGroups,
    anchor: Tensor,
    anchor_image: Tensor,
    num_images: int,
    normalization: str,
) -> Tensor:
    """Compute the share of each group in the loss of one side of one image (Eq 3, 5, 7).

    With ``normalization="paper"`` that loss is ``1/N sum_i 1/G_i sum_g max(0, alpha - m)``, where N
    is the number of anchors of the image with a positive pair and G_i the number of groups of
    anchor i with a positive pair; a group without a negative counts there but has no margin and
    adds nothing. With ``"released_code"`` it is the plain mean over all margins and one zero.

    Args:
        groups: result of :func:`find_groups`.
        anchor: (S, P) int64 in ``[0, A)``, the anchor of each pair.
        anchor_image: (A,) int64 in ``[0, num_images)``.
        num_images: N.
        normalization: one of :data:`NORMALIZATIONS`.

    Returns:
        (3, S, P) float; 0 where a pair is not the hardest negative of a group with a margin.
    """
    num_groups, num_sides = groups.num_positive_groups, len(anchor)
    if normalization == "paper":
        image = anchor_image.expand(num_sides, -1)  # (S, A)
        num_anchors = num_groups.new_zeros((num_sides, num_images))
        num_anchors.scatter_add_(1, image, num_groups[0])  # L1 has 0 or 1 group per anchor
        share = 1.0 / (num_groups * num_anchors.gather(1, image)).clamp(min=1.0)  # (3, S, A)
        index = anchor
    else:
        index = anchor_image.gather(0, anchor.view(-1)).view_as(anchor)  # the pair's image
        num_margins = num_groups.new_zeros((3, num_sides, num_images))
        has_margin = groups.is_hardest_negative.to(num_margins.dtype)
        num_margins.scatter_add_(2, index.expand_as(has_margin), has_margin)
        share = 1.0 / (num_margins + 1.0)  # (3, S, N)
    share_of_pair = share.gather(2, index.expand_as(groups.is_hardest_negative))
    return share_of_pair * groups.is_hardest_negative


def contrastive_losses(
    logits: Tensor,
    labels: Tensor,
    sides: AnchorSides,
    anchor_image: Tensor,
    *,
    num_images: int,
    num_classes: int,
    alphas: Tensor | Sequence[float] = (0.2, 0.2, 0.2),
    normalization: str = "paper",
) -> tuple[tuple[Tensor, Tensor, Tensor], ContrastiveGroups | None]:
    """Compute L1, L2 and L3 of a batch, each the sum of its sides.

    Losses are averaged within each image first and then over the images, so that a batch on one
    device gives the same loss as the same images spread over several devices.

    Args:
        logits: (P, C + 1).
        labels: (P, C) bool, the label set of each pair; a pair without a label is negative.
        sides: subjects as anchors, objects as anchors.
        anchor_image: (A,) int64 in ``[0, num_images)``: the image of each entity of the batch.
        num_images: N, images with or without pairs.
        num_classes: K.
        alphas: required margins alpha_1 to alpha_3; a tensor on the device of the logits saves a
            transfer.
        normalization: see :func:`group_weights`.

    Returns:
        The three losses, scalars without their lambdas in float32 (float64 if the logits are), and
        the groups they are made of; None instead of groups if there is no pair.

    Raises:
        ValueError: if the shapes do not match or the normalization is unknown.
    """
    if labels.shape != (len(logits), logits.shape[1] - 1):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do "
            "not match: expected (P, C + 1) and (P, C)."
        )
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is '{normalization}'; known: {', '.join(NORMALIZATIONS)}")
    phi = affinity(logits)
    if len(phi) == 0:
        zero = phi.sum()
        return (zero, zero, zero), None
    predicted = logits.detach()[:, :-1].max(dim=1).indices
    values = phi.detach()
    groups = find_groups(values, predicted, labels, sides, len(anchor_image), num_classes)
    weights = group_weights(groups, sides.anchor, anchor_image, num_images, normalization)
    alphas = torch.as_tensor(alphas, dtype=phi.dtype, device=phi.device)

    # Each loss is the sum over its groups of
    #     weight * max(0, alpha - (phi[lowest_positive] - phi[hardest_negative])) / N.
    # With the groups whose hinge is positive fixed, this is linear in the affinities, so collect
    # the constant and the slope of each affinity: the backward pass is then one product. (Not a
    # matrix product: autocast would round it.)
    is_violated = groups.margins(values) < alphas[:, None, None]
    weights = (weights * is_violated).flatten(1) / num_images  # (3, S * P)
    constants = weights.sum(dim=1) * alphas
    slopes = weights.view_as(groups.lowest_positive).sum(dim=1)  # (3, P): + for hardest negatives
    slopes = slopes.scatter_add(1, groups.lowest_positive.flatten(1), -weights)
    return (constants + (slopes * phi).sum(dim=1)).unbind(), groups
