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
from torch.autograd.function import once_differentiable

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
        lowest_positive_rank: (S, A, K + 1) and (S, A, C), 0 if the group of an anchor has no
            positive members: the groups of L2 and, last, the one of L1; those of L3.
    """

    is_hardest_negative: Tensor
    lowest_positive: Tensor
    lowest_positive_rank: tuple[Tensor, Tensor]

    def margins(self, phi: Tensor) -> Tensor:
        """Compute ``m`` of Eq 2, 4 and 6 from the (P,) affinities.

        Returns:
            (3, S, P), to be read where ``is_hardest_negative``.
        """
        max_negative = phi  # each pair in the role of the hardest negative of its own group
        return phi.take(self.lowest_positive) - max_negative

    def num_positive_groups(self, dtype: torch.dtype) -> Tensor:
        """Return the number of each anchor's groups with positive members, (3, S, A)."""
        first, by_predicate = (rank > 0 for rank in self.lowest_positive_rank)
        return torch.stack(
            [
                first[..., -1].to(dtype),
                first[..., :-1].sum(dim=-1, dtype=dtype),
                by_predicate.sum(dim=-1, dtype=dtype),
            ]
        )


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
    unique, so they also tell *which* pair is the lowest or the hardest. Most of the time goes into
    starting small operations, so all losses and both sides share each of them.

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
    is_positive = labels.view(torch.uint8).amax(dim=1).bool()  # faster than any()

    # Rank 1 is the pair with the smallest affinity. The lowest positive has the largest reversed
    # rank, so that both extremes are a maximum. 0 stands for "no such member", -1 for "takes no
    # part". float32 has the fastest scatter by rows, and tells 2 ** 24 ranks apart.
    by_affinity = phi.argsort(stable=True)
    ranks = torch.arange(1, num_pairs + 1, device=phi.device, dtype=torch.float32)
    rank = torch.empty_like(ranks).scatter_(0, by_affinity, ranks)
    rank = torch.where(is_positive, num_pairs + 1 - rank, rank).masked_fill(~sides.sampled, -1.0)
    negative_rank = rank.masked_fill(is_positive, -1.0)

    # Group ids: K + 1 per row (L2, and L1 as one more class), then C per row (L3). The same again
    # for the positive members.
    row = sides.anchor + torch.arange(0, num_rows, num_anchors, device=phi.device)[:, None]
    start_of_predicates = num_rows * (num_classes + 1)
    num_groups = start_of_predicates + num_rows * num_predicates
    group = torch.stack(  # (3, S, P)
        [
            row * (num_classes + 1) + num_classes,
            torch.add(sides.other_class, row, alpha=num_classes + 1),
            torch.add(predicted + start_of_predicates, row, alpha=num_predicates),
        ]
    )
    best = rank.new_zeros(2 * num_groups)
    # for pair in pairs:
    #     best[group[pair]] = max(best[group[pair]], rank[pair])
    # L3 has its negatives only: its positives have one group per label.
    member = torch.add(group, is_positive, alpha=num_groups)
    of_member = torch.stack([rank, rank, negative_rank])
    best.scatter_reduce_(0, member.view(-1), of_member.view(-1), "amax")
    lowest_positive_rank = best[num_groups:]  # reversed ranks
    first, by_predicate = lowest_positive_rank.split(
        [start_of_predicates, num_groups - start_of_predicates]
    )
    # for pair, e in labels:
    #     by_predicate[row[pair], e] = max(by_predicate[row[pair], e], rank[pair])
    rank_of_label = (rank[:, :, None] * labels.to(rank.dtype)).flatten(0, 1)  # (S * P, C)
    by_predicate = by_predicate.view(num_rows, num_predicates)
    by_predicate.scatter_reduce_(0, row.view(-1, 1).expand_as(rank_of_label), rank_of_label, "amax")

    lowest = lowest_positive_rank.take(group)  # of the pair's group
    return ContrastiveGroups(
        is_hardest_negative=(best.take(group) == negative_rank) & (lowest > 0),
        lowest_positive=by_affinity.take((num_pairs - lowest).clamp_(max=num_pairs - 1).long()),
        lowest_positive_rank=(
            first.view(num_sides, num_anchors, -1),
            by_predicate.view(num_sides, num_anchors, -1),
        ),
    )


@torch.no_grad()
def group_weights(
    groups: ContrastiveGroups,
    anchor: Tensor,
    anchor_image: Tensor,
    num_images: int,
    normalization: str,
    dtype: torch.dtype = torch.float32,
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
        dtype: of the result.

    Returns:
        (3, S, P) float; 0 where a pair is not the hardest negative of a group with a margin.
    """
    num_sides = len(anchor)
    if normalization == "paper":
        num_groups = groups.num_positive_groups(dtype)
        image = anchor_image.expand(num_sides, -1)  # (S, A)
        num_anchors = num_groups.new_zeros((num_sides, num_images))
        num_anchors.scatter_add_(1, image, num_groups[0])  # L1 has 0 or 1 group per anchor
        share = 1.0 / (num_groups * num_anchors.gather(1, image)).clamp(min=1.0)  # (3, S, A)
        index = anchor
    else:
        index = anchor_image.take(anchor)  # the pair's image
        has_margin = groups.is_hardest_negative.to(dtype)
        num_margins = has_margin.new_ones((3, num_sides, num_images))  # one more
        num_margins.scatter_add_(2, index.expand_as(has_margin), has_margin)
        share = num_margins.reciprocal_()  # (3, S, N)
    share_of_pair = share.gather(2, index.expand_as(groups.is_hardest_negative))
    return share_of_pair * groups.is_hardest_negative


class _LinearInAffinity(torch.autograd.Function):
    """Compute ``constants + slopes @ phi``, which has a gradient with respect to the logits.

    Args of ``apply``: (P, C + 1) logits, their softmax, (P,) affinities, (L, P) slopes and (L,)
    constants. Returns (L,).
    """

    @staticmethod
    def forward(ctx, logits, probabilities, phi, slopes, constants):
        ctx.save_for_backward(probabilities, phi, slopes)
        ctx.dtype = logits.dtype
        return constants + (slopes * phi).sum(dim=1)  # autocast would round a matrix product

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        probabilities, phi, slopes = ctx.saved_tensors
        # phi = 1 - p(none). Its gradient: p(none) * p(e) for predicate e, -p(none) * phi for none.
        of_phi = (gradient[:, None] * slopes).sum(dim=0) * probabilities[:, -1]
        of_logits = probabilities * of_phi[:, None]
        of_logits[:, -1] = -of_phi * phi
        return of_logits.to(ctx.dtype), None, None, None, None


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
    if len(logits) == 0:
        zero = affinity(logits).sum()
        return (zero, zero, zero), None
    values = logits.detach()
    probabilities = (values if values.dtype == torch.float64 else values.float()).softmax(dim=1)
    phi = probabilities[:, :-1].sum(dim=1)
    predicted = values[:, :-1].argmax(dim=1)
    groups = find_groups(phi, predicted, labels, sides, len(anchor_image), num_classes)
    case = sides.anchor, anchor_image, num_images, normalization
    weights = group_weights(groups, *case, phi.dtype)
    alphas = torch.as_tensor(alphas, dtype=phi.dtype, device=phi.device)

    # Each loss is the sum over its groups of
    #     weight * max(0, alpha - (phi[lowest_positive] - phi[hardest_negative])) / N.
    # With the groups whose hinge is positive fixed, this is linear in the affinities, so collect
    # the constant and the slope of each affinity: the backward pass is then one product.
    is_violated = groups.margins(phi) < alphas[:, None, None]
    weights = weights * is_violated
    if num_images > 1:
        weights = weights / num_images
    slopes = weights.sum(dim=1)  # (3, P): + for hardest negatives
    constants = slopes.sum(dim=1) * alphas
    lowest_positive = groups.lowest_positive.flatten(1)
    slopes = slopes.scatter_add_(1, lowest_positive, weights.flatten(1).neg_())
    losses = _LinearInAffinity.apply(logits, probabilities, phi, slopes, constants)
    return losses.unbind(), groups
