"""The graphical contrastive losses L1, L2, L3 (section 3, Eq 1-7).

Shapes: P pairs, A anchors, G groups, C predicates; the last of C + 1 logits is "no relationship".

All three losses are one thing: pairs fall into groups, a group's margin is its smallest positive
affinity less its largest negative one, and an anchor's loss is the mean hinge over its groups:

====  =====================  ===========================  =========================================
loss  group                  positive members             negative members
====  =====================  ===========================  =========================================
L1    anchor                 pairs with a predicate       pairs without
L2    anchor, class of the   the same                     the same
      other end
L3    anchor, predicate e    pairs labelled e             pairs without a predicate, whose highest
                                                          real predicate is e
====  =====================  ===========================  =========================================

Subjects and objects as anchors differ only in which end of a pair is called the anchor.
"""

from dataclasses import dataclass
from typing import Dict, Tuple

import torch
from torch import Tensor

__all__ = [
    "NORMALIZATIONS",
    "GroupMargins",
    "affinity",
    "contrastive_losses",
    "group_margins",
    "margin_loss",
]

NORMALIZATIONS = ("paper", "released_code")


def affinity(logits: Tensor) -> Tensor:
    """Eq 1: ``1 - p(no relationship | s, o)``, in float32 or wider.

    Computed as the sigmoid of the difference of log-sum-exps, which keeps its precision where the
    subtraction from 1 would lose it.

    Args:
        logits: (P, C + 1).

    Returns:
        (P,) in ``[0, 1]``.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.sigmoid(logits[:, :-1].logsumexp(dim=1) - logits[:, -1])


@dataclass
class GroupMargins:
    """Margins ``m`` of all groups; fields of shape (G,).

    ``margin`` is ``min positive - max negative`` affinity where ``valid``, and 0 elsewhere.
    ``valid`` groups have both positives and negatives; ``positive`` groups have positives.
    """

    margin: Tensor
    valid: Tensor
    positive: Tensor


def _select(values: Tensor, group: Tensor, num_groups: int) -> Tuple[Tensor, Tensor]:
    """Index of one smallest value of each group; the first in order where several are equal.

    Args:
        values: (K,) float, without gradient, K > 0.
        group: (K,) int64 in ``[0, num_groups]``; ``num_groups`` marks members of no group.

    Returns:
        (num_groups,) index into ``values`` (0 for an empty group), and (num_groups,) bool
        telling which groups have a member.
    """
    smallest = values.new_full((num_groups + 1,), float("inf"))
    smallest = smallest.scatter_reduce(0, group, values, "amin")
    order = torch.arange(len(values), device=values.device)
    order = order.masked_fill(values != smallest[group], len(values))
    first = order.new_full((num_groups + 1,), len(values)).scatter_reduce(0, group, order, "amin")
    first = first[:num_groups]
    exists = first < len(values)
    return first.masked_fill(~exists, 0), exists


def group_margins(
    positive: Tensor,
    positive_group: Tensor,
    negative: Tensor,
    negative_group: Tensor,
    num_groups: int,
) -> GroupMargins:
    """Margins of Eq 2, 4 and 6 for all groups at once, without a transfer to the host.

    The gradient of the min and of the max goes to one element each, as in a loop.

    Args:
        positive, positive_group: (K+,) affinities of positive members and their groups in
            ``[0, G]``; G marks members of no group, which are left out.
        negative, negative_group: (K-,) the same of negative members.
        num_groups: G.
    """
    if len(positive) == 0 or len(negative) == 0:
        zero = positive.new_zeros(num_groups) + (positive.sum() + negative.sum()) * 0.0
        none = torch.zeros(num_groups, dtype=torch.bool, device=positive.device)
        return GroupMargins(zero, none, none)
    low, has_positive = _select(positive.detach(), positive_group, num_groups)
    high, has_negative = _select(-negative.detach(), negative_group, num_groups)
    valid = has_positive & has_negative
    margin = (positive[low] - negative[high]).masked_fill(~valid, 0.0)
    return GroupMargins(margin, valid, has_positive)


def margin_loss(
    groups: GroupMargins, alpha: float, anchor_image: Tensor, num_images: int, normalization: str
) -> Tensor:
    """Hinge of the margins, averaged within each image and then over the images (Eq 3, 5, 7).

    With ``normalization="paper"`` an image's loss is ``1/N sum_i 1/G_i sum_g max(0, alpha - m)``,
    where N counts the image's anchors with a positive pair and G_i the groups of anchor i with a
    positive pair; groups without a negative count there and add nothing. With ``"released_code"``
    it is the plain mean over all margins of the image and one zero.

    Averaging within an image first makes a batch on one device equal to the same images spread
    over several devices.

    Args:
        groups: margins of G = A * groups-an-anchor groups, the anchor varying slowest.
        alpha: the margin that is asked for.
        anchor_image: (A,) int64, the image of each anchor, in ``[0, num_images)``.
        num_images: images of the batch, with or without pairs.
        normalization: one of :data:`NORMALIZATIONS`.

    Returns:
        Scalar.
    """
    num_anchors = len(anchor_image)
    hinge = (alpha - groups.margin).clamp(min=0.0).masked_fill(~groups.valid, 0.0)
    if num_anchors == 0:
        return hinge.sum() * 0.0
    hinge = hinge.view(num_anchors, -1)
    if normalization == "paper":
        present = groups.positive.view(num_anchors, -1).sum(dim=1)
        per_anchor = hinge.sum(dim=1) / present.clamp(min=1)
        counted = (present > 0).to(hinge.dtype)
    elif normalization == "released_code":
        per_anchor = hinge.sum(dim=1)
        counted = groups.valid.view(num_anchors, -1).sum(dim=1).to(hinge.dtype)
    else:
        raise ValueError(f"normalization is '{normalization}'; known: {', '.join(NORMALIZATIONS)}")
    total = hinge.new_zeros(num_images).index_add(0, anchor_image, per_anchor)
    count = hinge.new_zeros(num_images).index_add(0, anchor_image, counted)
    count = count.clamp(min=1.0) if normalization == "paper" else count + 1.0
    return (total / count).sum() / num_images


def contrastive_losses(
    logits: Tensor,
    labels: Tensor,
    sampled: Tensor,
    anchor: Tensor,
    other_class: Tensor,
    anchor_image: Tensor,
    *,
    num_images: int,
    num_classes: int,
    alphas: Tuple[float, float, float] = (0.2, 0.2, 0.2),
    normalization: str = "paper",
) -> Tuple[Tuple[Tensor, Tensor, Tensor], Dict[str, GroupMargins]]:
    """L1, L2 and L3 of one side, for all images of a batch.

    Args:
        logits: (P, C + 1).
        labels: (P, C) bool, the label set of each pair; a pair without a label is negative.
        sampled: (P,) bool, the pairs that take part.
        anchor: (P,) int64 in ``[0, A)``: the pair's subject (or object), numbered over the batch.
        other_class: (P,) int64 in ``[0, num_classes)``: the class of the pair's other end.
        anchor_image: (A,) int64: the image of each anchor.
        num_images: images of the batch.
        num_classes: number of entity classes.
        alphas: the margins asked for, alpha_1 to alpha_3.
        normalization: see :func:`margin_loss`.

    Returns:
        The three losses (scalars, without their lambdas), and the margins by loss name.
    """
    phi = affinity(logits)
    num_anchors, num_predicates = len(anchor_image), labels.shape[1]
    labels = labels & sampled[:, None]
    is_positive = labels.any(dim=1)
    is_negative = sampled & ~is_positive
    predicted = logits.detach()[:, :-1].argmax(dim=1)
    every_predicate = torch.arange(num_predicates, device=labels.device)

    def members(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
        return group.masked_fill(~mask, num_groups)

    def margins_by(group: Tensor, num_groups: int) -> GroupMargins:
        in_positive = members(is_positive, group, num_groups)
        in_negative = members(is_negative, group, num_groups)
        return group_margins(phi, in_positive, phi, in_negative, num_groups)

    num_groups = num_anchors * num_predicates
    label_groups = anchor[:, None] * num_predicates + every_predicate
    margins = {
        "class_agnostic": margins_by(anchor, num_anchors),
        "entity_class": margins_by(anchor * num_classes + other_class, num_anchors * num_classes),
        "predicate_class": group_margins(
            phi[:, None].expand_as(labels).reshape(-1),
            members(labels, label_groups, num_groups).reshape(-1),
            phi,
            members(is_negative, anchor * num_predicates + predicted, num_groups),
            num_groups,
        ),
    }
    losses = tuple(
        margin_loss(groups, alpha, anchor_image, num_images, normalization)
        for groups, alpha in zip(margins.values(), alphas)
    )
    return losses, margins
