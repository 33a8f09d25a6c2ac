"""The graphical contrastive losses L1, L2, L3 (section 3, Eq 1-7).

Shapes: P pairs, C predicates, K entity classes, N images, A entities of the batch. Each entity is
an anchor once a side, subject or object, so that there are B = S * A anchors of S sides. The last
of C + 1 logits is "no relationship".

All three losses are one thing: an anchor's pairs fall into groups, a group's margin is its smallest
positive affinity less its largest negative one, and an anchor's loss is the mean hinge over its
groups:

====  ====================  ===========================  ==========================================
loss  group of an anchor    positive members             negative members
====  ====================  ===========================  ==========================================
L1    one                   pairs with a predicate       pairs without
L2    class of the other    the same                     the same
      end
L3    predicate e           pairs labelled e             pairs without a predicate, whose highest
                                                         real predicate is e
====  ====================  ===========================  ==========================================

Subjects and objects as anchors differ only in which end of a pair is called the anchor: both sides
pass through together. Pairs are put in order of their affinity once; a group's smallest and largest
members are then its first and last ones in that order, found for all groups at once by a scatter.
Nothing is moved to the host.
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
    """Eq 1: ``1 - p(no relationship | s, o)``, in float32 or wider.

    Computed as the sum of the other probabilities, which keeps its precision where the subtraction
    from 1 would lose it.

    Args:
        logits: (P, C + 1).

    Returns:
        (P,) in ``[0, 1]``, up to rounding.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.softmax(dim=1)[:, :-1].sum(dim=1)


@dataclass
class AnchorSides:
    """Which pairs serve each side of L1-L3, and which end of each is the anchor there.

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

    A group that has a margin is represented by its largest negative member, since each negative
    pair is in just one group of each loss and side. The tensors are inference tensors: to be read,
    not to be differentiated through.

    Attributes:
        valid: (3, S, P) bool, where the pair represents a group.
        positive: (3, S, P) int64, the pair with the smallest affinity among the positive members of
            the group that the pair represents; any pair where ``valid`` is False.
        groups_of: (3, S, A) float, number of each anchor's groups that have positive members.
    """

    valid: Tensor
    positive: Tensor
    groups_of: Tensor

    def margins(self, phi: Tensor) -> Tensor:
        """(3, S, P): ``m`` of Eq 2, 4 and 6, where ``valid``, from the (P,) affinities."""
        return phi.gather(0, self.positive.flatten()).view_as(self.positive) - phi


@torch.inference_mode()
def find_groups(
    phi: Tensor,
    predicted: Tensor,
    labels: Tensor,
    sides: AnchorSides,
    num_anchors: int,
    num_classes: int,
) -> ContrastiveGroups:
    """Smallest positive and largest negative member of all groups of L1, L2 and L3.

    Args:
        phi: (P,) affinities, P > 0. Of equal ones the first counts as the smallest.
        predicted: (P,) int64, the highest real predicate.
        labels: (P, C) bool, the label set of each pair; a pair without a label is negative.
        sides: S sides.
        num_anchors: A.
        num_classes: K.
    """
    num_sides, num_pairs = sides.sampled.shape
    num_predicates, num_rows = labels.shape[1], num_sides * num_anchors
    order = phi.argsort(stable=True)
    place = torch.arange(num_pairs, device=phi.device)
    place = torch.empty_like(order).scatter_(0, order, place)
    from_behind = num_pairs - 1 - place
    is_positive = labels.sum(dim=1) > 0

    # Groups are numbered through, those of L1, of L2, of L3; positives have numbers of their own.
    anchor = sides.anchor + torch.arange(0, num_rows, num_anchors, device=phi.device)[:, None]
    by_class = anchor * num_classes + (sides.other_class + num_rows)
    by_predicted = anchor * num_predicates + predicted
    groups = torch.stack([anchor, by_class, by_predicted + num_rows * (1 + num_classes)])
    num_groups = num_rows * (1 + num_classes + num_predicates)

    # The best member of a group is its last negative, and the last positive from behind; -1 stands
    # for none. (That of the positives by their predicted predicate is of no use.)
    member = torch.where(is_positive, from_behind, place)
    member = torch.where(sides.sampled, member, -1).expand_as(groups).reshape(-1)
    index = (groups + is_positive * num_groups).view(-1)
    best = place.new_full((2 * num_groups,), -1).scatter_reduce_(0, index, member, "amax")
    is_best = ((best.gather(0, index) == member) & (member >= 0)).view_as(groups)

    # A pair with several labels is a member of several groups of L3, so a table of (P, C) is
    # scattered row by row: in float32, for which torch does that fastest, and which tells 2 ** 24
    # places apart.
    table = from_behind.float()[:, None].where(labels, -1.0)
    of_label = table.new_full((num_rows + 1, num_predicates), -1.0)
    for rows in torch.where(sides.sampled, anchor, num_rows):  # two sides
        of_label.scatter_reduce_(0, rows[:, None].expand_as(table), table, "amax")
    of_label = of_label[:-1]

    groups_of = phi.new_zeros((2, num_rows)).scatter_add_(
        1, anchor.view(1, -1).expand(2, -1), (is_best & is_positive)[:2].to(phi.dtype).view(2, -1)
    )
    labels_of = (of_label >= 0).sum(dim=1, dtype=phi.dtype)
    of_label = of_label.reshape(-1).gather(0, by_predicted.view(-1)).long()
    of_pair = torch.cat([best[num_groups:].gather(0, groups[:2].view(-1)), of_label])
    return ContrastiveGroups(
        valid=is_best & ~is_positive & (of_pair >= 0).view_as(groups),
        positive=order.flip(0).gather(0, of_pair.clamp(min=0)).view_as(groups),
        groups_of=torch.cat([groups_of, labels_of[None]]).view(3, num_sides, num_anchors),
    )


@torch.inference_mode()
def group_weights(
    groups: ContrastiveGroups,
    anchor: Tensor,
    anchor_image: Tensor,
    num_images: int,
    normalization: str,
) -> Tensor:
    """Share of each group in the loss of one side of one image (Eq 3, 5, 7).

    With ``normalization="paper"`` that loss is ``1/N sum_i 1/G_i sum_g max(0, alpha - m)``, where N
    counts the image's anchors with a positive pair and G_i the groups of anchor i with a positive
    pair; groups without a negative count there and add nothing. With ``"released_code"`` it is the
    plain mean over all margins and one zero.

    Args:
        groups: what :func:`find_groups` gives.
        anchor: (S, P) int64 in ``[0, A)``, the anchor of each pair.
        anchor_image: (A,) int64 in ``[0, num_images)``.
        num_images: N.
        normalization: one of :data:`NORMALIZATIONS`.

    Returns:
        (3, S, P) float; 0 where a pair represents no group.
    """
    if normalization == "paper":
        image = anchor_image.expand(len(anchor), -1)  # (S, A)
        anchors_of = groups.groups_of.new_zeros((len(anchor), num_images))
        anchors_of.scatter_add_(1, image, groups.groups_of[0])  # 0 or 1 in L1
        share = 1.0 / (groups.groups_of * anchors_of.gather(1, image)).clamp(min=1.0)
        index = anchor
    else:
        index = anchor_image.gather(0, anchor.view(-1)).view_as(anchor)
        margins_of = groups.groups_of.new_zeros((3, len(anchor), num_images))
        valid = groups.valid.to(margins_of.dtype)
        margins_of.scatter_add_(2, index.expand_as(valid), valid)
        share = 1.0 / (margins_of + 1.0)
    return share.gather(2, index.expand_as(groups.valid)) * groups.valid


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
    """L1, L2 and L3 of all images of a batch, the sum of their sides.

    Losses are averaged within an image first and then over the images, so that a batch on one
    device is equal to the same images spread over several devices.

    Args:
        logits: (P, C + 1).
        labels: (P, C) bool, the label set of each pair; a pair without a label is negative.
        sides: subjects as anchors, objects as anchors.
        anchor_image: (A,) int64 in ``[0, num_images)``: the image of each entity of the batch.
        num_images: N, images with or without pairs.
        num_classes: K.
        alphas: the margins asked for, alpha_1 to alpha_3; a tensor on the device of the logits
            saves a transfer.
        normalization: see :func:`group_weights`.

    Returns:
        The three losses, scalars without their lambdas in float32 (float64 where the logits are),
        and the groups they are made of; None where there is no pair.

    Raises:
        ValueError: shapes that do not fit, an unknown normalisation.
    """
    if labels.shape != (len(logits), logits.shape[1] - 1):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do "
            "not fit: expected (P, C + 1) and (P, C)."
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
    with torch.inference_mode():
        weights = group_weights(groups, sides.anchor, anchor_image, num_images, normalization)
        alphas = torch.as_tensor(alphas, dtype=phi.dtype, device=phi.device)
        active = groups.margins(values) < alphas[:, None, None]
        weights = (weights * active).flatten(1) / num_images
        slopes = weights.view_as(groups.positive).sum(dim=1)
        slopes = slopes.scatter_add_(1, groups.positive.flatten(1), -weights)
        constants = weights.sum(dim=1) * alphas
    # The losses are linear in the affinities between the corners of the hinges. (A matrix product
    # would be rounded under autocast, and inference tensors cannot be kept for the backward pass.)
    return (constants.clone() + (slopes.clone() * phi).sum(dim=1)).unbind(), groups
