"""Exporting RelDN to TorchScript as one function from an image to tensors.

The exported function is the eager model, except that it scores all pairs: the eager search for the
top triplets stops early depending on the scores, which a traced graph cannot do.

Shapes: R detections, K relations, P pairs, C predicates. Boxes are XYXY in pixels of the input.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.modeling.roi_heads import cascade_rcnn
from detectron2.structures import Boxes

from .modeling.detectors import PrecomputedDetector
from .modeling.meta_arch import RelDN
from .modeling.relation_head import RelDNHead
from .modeling.relation_head.pairs import EntityBatch, candidate_pairs
from .utils.file_io import write_atomically

__all__ = ["OUTPUT_NAMES", "RelDNExport", "save_torchscript"]

OUTPUT_NAMES = (
    "boxes",  # (R, 4)
    "classes",  # (R,) int64
    "box_scores",  # (R,)
    "pairs",  # (K, 2) int64, subject and object index into the boxes
    "predicates",  # (K,) int64
    "scores",  # (K,), descending
    "predicate_scores",  # (K,)
)


class RelDNExport(nn.Module):
    """Predict SGDET on one image tensor; inputs and outputs are tensors only."""

    def __init__(self, model: RelDN, size: Sequence[int] | None = None):
        """
        Args:
            model: with its weights loaded.
            size: (3, H, W), the only shape that is accepted; None accepts any.

        Raises:
            TypeError: if its relation head or its detector cannot be exported.
        """
        super().__init__()
        if isinstance(model.detector, PrecomputedDetector):
            raise TypeError("a model whose detections come from files cannot be exported")
        if not isinstance(model.relation_head, RelDNHead):
            raise TypeError(f"only RelDNHead can be exported, not {type(model.relation_head)}")
        model.relation_head.check_counts()
        self.model = model.eval()
        self.size = None if size is None else tuple(size)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Predict one image.

        Args:
            image: (3, H, W) in [0, 255], channels in the order of the config's ``INPUT.FORMAT``.

        Returns:
            tensors in the order of ``OUTPUT_NAMES``.
        """
        model, head = self.model, self.model.relation_head
        if self.size is not None:
            image = image.expand(self.size)  # fails for another size, in a traced graph too
        inputs = [{"image": image}]
        images = model.detector.preprocess(inputs)
        features, maps = model.feature_maps(images)
        detections = model.detector.detect(inputs, images, features)[0]
        boxes, classes = detections.pred_boxes.tensor, detections.pred_classes

        size = torch.tensor([list(image.shape[-2:])], dtype=boxes.dtype, device=boxes.device)
        entities = self._encode(features, boxes, classes, size)
        entities, detections = head.refine(entities, detections, classes_given=False)
        classes, box_scores = detections.pred_classes, detections.scores
        subjects, objects = candidate_pairs(boxes, head.overlap_filter).nonzero().unbind(1)
        logits = head.pair_logits(entities, maps, subjects, objects)
        probabilities = head.prior(logits)[:, :-1]  # without "no relationship"
        factors = head.entity_factors(box_scores)
        pair_scores = factors[subjects] * factors[objects]
        pair_index, predicates, scores = rank_triplets(
            probabilities, pair_scores, head.predicates_per_pair, head.topk
        )
        pairs = torch.stack([subjects[pair_index], objects[pair_index]], dim=1)
        predicate_scores = probabilities[pair_index, predicates]
        return boxes, classes, box_scores, pairs, predicates, scores, predicate_scores

    def _encode(
        self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor, size: Tensor
    ) -> EntityBatch:
        """Encode entities as the head does, but for any number of detections when traced."""
        head = self.model.relation_head
        subject_vectors = object_vectors = None
        if head.entity_pooler is not None:
            pooled = head.entity_pooler([features[x] for x in head.in_features], [Boxes(boxes)])
            if head.subject_box_head is not None:
                subject_vectors = head.subject_box_head(pooled)
            if head.object_box_head is not None:
                object_vectors = head.object_box_head(pooled)
        image = torch.zeros_like(classes)
        vectors = subject_vectors, object_vectors
        return head.add_context(EntityBatch(boxes, classes, image, size, [len(boxes)], *vectors))


@contextmanager
def _without_gradient_scaling() -> Iterator[None]:
    """Skip Cascade R-CNN's scaling of gradients, a Python function that cannot be saved.

    It changes gradients only, never a value.
    """
    original = getattr(cascade_rcnn, "_ScaleGradient", None)
    if original is None:
        yield
        return
    cascade_rcnn._ScaleGradient = SimpleNamespace(apply=lambda values, scale: values)
    try:
        yield
    finally:
        cascade_rcnn._ScaleGradient = original


def rank_triplets(
    probabilities: Tensor, pair_scores: Tensor, predicates_per_pair: Sequence[int | None], topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find what :class:`.topk.TopTriplets` finds, in operations that can be traced for any P.

    Args:
        probabilities: (P, C), without "no relationship".
        pair_scores: (P,), ``p_det(s) * p_det(o)``.
        predicates_per_pair, topk: see :class:`.topk.TopTriplets`.

    Returns:
        (K,) pair index, (K,) predicate and (K,) score, in descending order of the score; equal
        scores are ordered by pair, then predicate.
    """
    num_predicates = probabilities.shape[1]
    scores = (probabilities * pair_scores[:, None]).flatten()
    best_first = probabilities.argsort(dim=1, descending=True, stable=True)
    rank = best_first.argsort(dim=1).flatten()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for k in predicates_per_pair:
        # Scores are at least 0, so -1 marks triplets beyond the best k of their pair.
        allowed = scores.masked_fill(rank >= k, -1.0) if k is not None else scores
        order = allowed.argsort(descending=True, stable=True)[:topk]
        kept = kept.scatter(0, order, allowed[order] >= 0) | kept
    chosen = kept.nonzero()[:, 0]
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
    pairs = torch.div(chosen, num_predicates, rounding_mode="floor")
    return pairs, chosen % num_predicates, scores[chosen]


def save_torchscript(
    model: RelDN,
    example: Tensor,
    path: str | Path,
    thing_classes: Sequence[str] = (),
    predicate_classes: Sequence[str] = (),
    image_format: str = "BGR",
) -> list[Tensor]:
    """Trace the model on an example and save it with its names.

    The file contains ``reldn.json`` as an extra file: ``thing_classes``, ``predicate_classes``,
    ``input`` (shape), ``input_format`` and ``outputs`` (names).

    Args:
        model: with its weights loaded.
        example: (3, H, W) image; the saved model accepts images of this size only. The model must
            find at least one relation in it, so that tracing runs through all its parts.
        path: of the file.
        thing_classes, predicate_classes: names by id.
        image_format: order of the channels.

    Returns:
        the eager model's outputs on the example.

    Raises:
        ValueError: if the model finds no relation in the example.
        OSError: if the file cannot be written.
    """
    exportable = RelDNExport(model, example.shape).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing warns of every size that it fixes; the image size is fixed on purpose.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        expected = exportable(example)
        if len(expected[0]) < 2 or len(expected[3]) < 1:
            raise ValueError(
                f"{len(expected[0])} entities are found in the example image, with "
                f"{len(expected[3])} relations; use an image that shows at least one relation"
            )
        with _without_gradient_scaling():
            traced = torch.jit.trace(exportable, (example,), check_trace=False)
        description: dict[str, Any] = {
            "thing_classes": list(thing_classes),
            "predicate_classes": list(predicate_classes),
            "input": list(example.shape),
            "input_format": image_format,
            "outputs": list(OUTPUT_NAMES),
        }
        extra = {"reldn.json": json.dumps(description)}
        with write_atomically(path, "wb") as file:
            torch.jit.save(traced, file, _extra_files=extra)
    return list(expected)
