"""Sampling of training pairs (section 5), on the device of the input.

Shapes: R entities of one image, Q sampled pairs, C predicates.

Pairs are drawn as masks over the (R, R) grid of an image, so that no pair is drawn twice and the
pairs of all losses can be joined: each distinct pair passes through the head once. All draws use
the same random key per pair. So each draw is uniform over its candidates, as if it were the only
one, and the draws share as many pairs as their preferences allow.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils.registry import Registry

from ...utils.registry import build_registered
from ..sampling import random_keys, sample_mask
from .pairs import PairGrid, match_pairs

__all__ = [
    *("PAIR_SAMPLER_REGISTRY", "PairSampler", "RelDNPairSampler", "SampledPairs"),
    *("build_pair_sampler", "leaves_no_choice", "sample_pairs", "training_pairs"),
]

PAIR_SAMPLER_REGISTRY = Registry("PAIR_SAMPLER")
PAIR_SAMPLER_REGISTRY.__doc__ = """
Registry for samplers of training pairs, subclasses of :class:`PairSampler`.

The registered object is called with ``obj(cfg)``.
"""


class SampleError(ValueError):
    """A sampler's masks or pairs are wrong; :func:`training_pairs` adds the sampler's name."""


@dataclass
class SampledPairs:
    """Distinct sampled pairs of one image, and the losses that use each of them.

    Attributes:
        subjects, objects: (Q,) int64, indices into the image's R entities.
        labels: (Q, C) bool, the label set of each pair.
        for_predicate: (Q,) bool, drawn for L0.
        for_subjects, for_objects: (Q,) bool, drawn for L1-L3 with subjects, objects as anchors.
    """

    subjects: Tensor
    objects: Tensor
    labels: Tensor
    for_predicate: Tensor
    for_subjects: Tensor
    for_objects: Tensor

    @classmethod
    def from_masks(
        cls,
        grid: PairGrid,
        for_predicate: Tensor,
        for_subjects: Tensor | None = None,
        for_objects: Tensor | None = None,
    ) -> "SampledPairs":
        """Collect the pairs that at least one mask chooses.

        The number of pairs is read on the host, once.

        Args:
            grid: the image's pairs.
            for_predicate, for_subjects, for_objects: (R, R) bool, subsets of ``grid.candidates``;
                None chooses no pair.

        Raises:
            SampleError: a mask has another shape or type.
        """
        for mask in (for_predicate, for_subjects, for_objects):
            if mask is not None:
                _check_mask(mask, grid.candidates.shape)
        none = torch.zeros_like(for_predicate)
        for_subjects = none if for_subjects is None else for_subjects
        for_objects = none if for_objects is None else for_objects
        subjects, objects = (for_predicate | for_subjects | for_objects).nonzero(as_tuple=True)
        return cls(
            subjects=subjects,
            objects=objects,
            labels=grid.label_sets[grid.match[subjects, objects]],
            for_predicate=for_predicate[subjects, objects],
            for_subjects=for_subjects[subjects, objects],
            for_objects=for_objects[subjects, objects],
        )

    @classmethod
    def cat(cls, batch: list["SampledPairs"], sizes: list[int]) -> "SampledPairs":
        """Concatenate images; indices then point into the entities of the whole batch.

        Args:
            batch: pairs of each image.
            sizes: number of entities of each image.
        """
        starts = list(accumulate(sizes[:-1], initial=0))
        return cls(
            subjects=torch.cat([x.subjects + start for x, start in zip(batch, starts)]),
            objects=torch.cat([x.objects + start for x, start in zip(batch, starts)]),
            labels=torch.cat([x.labels for x in batch]),
            for_predicate=torch.cat([x.for_predicate for x in batch]),
            for_subjects=torch.cat([x.for_subjects for x in batch]),
            for_objects=torch.cat([x.for_objects for x in batch]),
        )

    def __len__(self) -> int:
        return len(self.subjects)


def sample_pairs(
    grid: PairGrid,
    *,
    num_pairs: int = 512,
    num_positive: int = 128,
    num_anchor_positive: int = 128,
    num_anchor_negative: int = 128,
    generator: torch.Generator | None = None,
) -> SampledPairs:
    """Draw the pairs of one image for L0 and for both sides of L1-L3.

    L0 takes up to ``num_positive`` positive pairs and fills up to ``num_pairs`` with negative ones.
    Annotated pairs of ground-truth boxes come before other positive pairs. All of them take part,
    even more than ``num_positive``, but not more than ``num_pairs``.

    With subjects as anchors L1-L3 take up to ``num_anchor_positive`` positive pairs and up to
    ``num_anchor_negative`` negative ones whose subject matches a ground-truth subject, those first
    whose object matches a ground-truth object; with objects as anchors the other way round.

    The number of drawn pairs is read on the host, once; everything else stays on the device.

    Args:
        grid: the image's pairs.
        num_pairs, num_positive, num_anchor_positive, num_anchor_negative: see above.
        generator: source of randomness; the device's default generator when None.
    """
    positive, negative = grid.positive, grid.negative
    keys = random_keys(positive, generator)
    annotated = grid.annotated & positive  # without those whose relations are all dropped
    num_positive = annotated.sum().clamp(min=min(num_positive, num_pairs), max=num_pairs)
    chosen = sample_mask(positive, num_positive, num_pairs, preferred=annotated, keys=keys)
    num_negative = num_pairs - chosen.sum()
    for_predicate = chosen | sample_mask(negative, num_negative, num_pairs, keys=keys)
    related = sample_mask(positive, num_anchor_positive, num_anchor_positive, keys=keys)

    def for_anchors(is_anchor: Tensor, is_other: Tensor) -> Tensor:
        return related | sample_mask(
            negative & is_anchor,
            num_anchor_negative,
            num_anchor_negative,
            preferred=is_other.expand_as(negative),
            keys=keys,
        )

    for_subjects = for_anchors(grid.is_subject[:, None], grid.is_object[None])
    for_objects = for_anchors(grid.is_object[None], grid.is_subject[:, None])
    return SampledPairs.from_masks(grid, for_predicate, for_subjects, for_objects)


def leaves_no_choice(
    grid: PairGrid,
    *,
    num_pairs: int = 512,
    num_positive: int = 128,
    num_anchor_positive: int = 128,
    num_anchor_negative: int = 128,
) -> bool:
    """Tell whether :func:`sample_pairs` draws all candidates of an image, whatever its randomness.

    Reads two numbers on the host. Arguments as for :func:`sample_pairs`.
    """
    positive, negative = int(grid.positive.sum()), int(grid.negative.sum())
    return (
        positive <= num_positive
        and positive + negative <= num_pairs
        and (num_anchor_positive == 0 or positive <= num_anchor_positive)
        and (num_anchor_negative == 0 or negative <= num_anchor_negative)
    )


class PairSampler(ABC):
    """Draws the training pairs of one image.

    A subclass implements :meth:`sample`. It need not keep the pairs of images that come again:
    :func:`training_pairs` does.

    Attributes:
        for_anchors: whether any loss reads ``for_subjects`` and ``for_objects`` of the pairs. The
            relation head sets it; pairs that are drawn for nothing are scored for nothing.
    """

    for_anchors: bool = True

    @abstractmethod
    def sample(self, grid: PairGrid, generator: torch.Generator | None = None) -> SampledPairs:
        """Draw pairs, for instance as masks over the grid (:meth:`SampledPairs.from_masks`).

        Args:
            grid: the image's pairs.
            generator: source of randomness; the device's default generator when None. It is given
                only if :meth:`leaves_no_choice` is True.
        """

    def leaves_no_choice(self, grid: PairGrid) -> bool:
        """Tell whether :meth:`sample` draws the same pairs whatever its randomness.

        The pairs of an image that comes again unchanged are then kept.
        """
        return False


@PAIR_SAMPLER_REGISTRY.register()
class RelDNPairSampler(PairSampler):
    """Draw up to a number of positive and of negative pairs for each loss; see `sample_pairs`."""

    @configurable
    def __init__(
        self,
        *,
        num_pairs: int = 512,
        num_positive: int = 128,
        num_anchor_positive: int = 128,
        num_anchor_negative: int = 128,
    ):
        """Arguments as for :func:`sample_pairs`."""
        self.num_pairs = num_pairs
        self.num_positive = num_positive
        self.num_anchor_positive = num_anchor_positive
        self.num_anchor_negative = num_anchor_negative

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        sampling = cfg.MODEL.ROI_RELATION_HEAD.SAMPLING
        return {
            "num_pairs": sampling.PAIRS,
            "num_positive": sampling.POSITIVE_PAIRS,
            "num_anchor_positive": sampling.ANCHOR_POSITIVE_PAIRS,
            "num_anchor_negative": sampling.ANCHOR_NEGATIVE_PAIRS,
        }

    @property
    def limits(self) -> dict[str, int]:
        """Return the keyword arguments of :func:`sample_pairs`."""
        return {
            "num_pairs": self.num_pairs,
            "num_positive": self.num_positive,
            "num_anchor_positive": self.num_anchor_positive * self.for_anchors,
            "num_anchor_negative": self.num_anchor_negative * self.for_anchors,
        }

    def sample(self, grid: PairGrid, generator: torch.Generator | None = None) -> SampledPairs:
        return sample_pairs(grid, **self.limits, generator=generator)

    def leaves_no_choice(self, grid: PairGrid) -> bool:
        return leaves_no_choice(grid, **self.limits)


def build_pair_sampler(cfg: CfgNode) -> PairSampler:
    """Build the sampler named by ``MODEL.ROI_RELATION_HEAD.SAMPLING.NAME``."""
    key = "MODEL.ROI_RELATION_HEAD.SAMPLING.NAME"
    name = cfg.MODEL.ROI_RELATION_HEAD.SAMPLING.NAME
    return build_registered(PAIR_SAMPLER_REGISTRY, name, key, PairSampler, cfg)


def training_pairs(
    proposals: Instances,
    instances: Instances,
    relations: Instances,
    *,
    sampler: PairSampler,
    **matching: Any,
) -> SampledPairs:
    """Match the pairs of one image with its ground truth and sample from them.

    Args:
        proposals: the entities: ``proposal_boxes``, ``gt_classes`` and ``gt_index``. If the image
            comes again with the same entities, they have a dict ``_derived`` (see
            :class:`..meta_arch.RelDN`), in which this function keeps what it would compute again.
        instances, relations: ground truth.
        sampler: draws the pairs.
        matching: keyword arguments of :func:`.pairs.match_pairs`.
    """
    derived = getattr(proposals, "_derived", None) or {}
    if "pairs" in derived:
        return derived["pairs"]
    grid = derived.get("grid")
    if grid is None:
        grid = match_pairs(
            (proposals.proposal_boxes, proposals.gt_classes),
            (instances.gt_boxes, instances.gt_classes),
            relations.gt_pairs,
            relations.gt_predicates,
            gt_index=proposals.gt_index,
            gt_kept=relations.gt_kept if relations.has("gt_kept") else None,
            **matching,
        )
        if hasattr(proposals, "_derived"):
            if sampler.leaves_no_choice(grid):
                # A generator of its own: in a resumed run, which has kept nothing yet, the default
                # one must be in the same state after this as in a run that uses the kept pairs.
                own = torch.Generator(grid.candidates.device)
                proposals._derived["pairs"] = _draw(sampler, grid, generator=own)
                return proposals._derived["pairs"]
            proposals._derived["grid"] = grid
    return _draw(sampler, grid)


def _draw(sampler: PairSampler, grid: PairGrid, **kwargs: Any) -> SampledPairs:
    """Call a sampler and check what it returns; an error names the sampler's class."""
    source = f"{type(sampler).__name__}.sample"
    try:
        pairs = sampler.sample(grid, **kwargs)
    except SampleError as error:
        raise ValueError(f"{source}: {error}") from error
    if not isinstance(pairs, SampledPairs):
        raise TypeError(
            f"{source} returned a {type(pairs).__name__}: return SampledPairs.from_masks(grid, ...)"
        )
    num_pairs, num_predicates = len(pairs.subjects), grid.label_sets.shape[1]
    for field in fields(pairs):
        expected = (num_pairs, num_predicates) if field.name == "labels" else (num_pairs,)
        shape = tuple(getattr(pairs, field.name).shape)
        if shape != expected:
            raise ValueError(
                f"{source} returned pairs whose {field.name} have shape {shape}; expected "
                f"{expected} for {num_pairs} pairs and {num_predicates} predicates."
            )
    return pairs


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        given = f"a {type(mask).__name__}"
        if isinstance(mask, Tensor):
            given = f"{tuple(mask.shape)} {str(mask.dtype).removeprefix('torch.')}"
        raise SampleError(
            f"a mask is {given}; expected {tuple(shape)} bool, one row per subject and one column "
            "per object of the image's entities, as grid.candidates."
        )
