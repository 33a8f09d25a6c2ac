"""RelDN as one function from an image to tensors, for TorchScript.

The exported function is the eager model with the pairs computed exhaustively: a lazy visit stops
where the scores say so, which a traced graph cannot.

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
from .modeling.relation_head.pairs import EntityBatch
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
    """Task SGDET on one image tensor, without Python objects at its border."""

    def __init__(self, model: RelDN, size: Sequence[int] | None = None):
        """
        Args:
            model: with its weights.
            size: (3, H, W), the only shape that is taken; None takes any.

        Raises:
            TypeError: its relation head or its detector is of another kind.
        """
        super().__init__()
        if isinstance(model.detector, PrecomputedDetector):
            raise TypeError("a model whose detections come from files cannot be exported")
        if not isinstance(model.relation_head, RelDNHead):
            raise TypeError(f"only RelDNHead can be exported, not {type(model.relation_head)}")
        self.model = model.eval()
        self.size = None if size is None else tuple(size)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Predict.

        Args:
            image: (3, H, W) in [0, 255], channels as the config's ``INPUT.FORMAT`` says.

        Returns:
            tensors in the order of ``OUTPUT_NAMES``.
        """
        model, head = self.model, self.model.relation_head
        if self.size is not None:
            image = image.expand(self.size)  # an error for another size, in a traced graph too
        inputs = [{"image": image}]
        images = model.detector.preprocess(inputs)
        features, maps = model.feature_maps(images)
        found = model.detector.detect(inputs, images, features)[0]
        boxes, classes, box_scores = found.pred_boxes.tensor, found.pred_classes, found.scores

        size = torch.tensor([list(image.shape[-2:])], dtype=boxes.dtype, device=boxes.device)
        entities = self._encode(features, boxes, classes, size)
        subjects, objects = all_pairs(boxes, head.overlap_filter)
        logits = head.pair_logits(entities, maps, subjects, objects)
        probabilities = logits.float().softmax(dim=1)[:, :-1]
        pair_scores = box_scores[subjects] * box_scores[objects]
        pair, predicates, scores = rank_everything(
            probabilities, pair_scores, head.predicates_per_pair, head.topk
        )
        pairs = torch.stack([subjects[pair], objects[pair]], dim=1)
        best = probabilities[pair, predicates]
        return boxes, classes, box_scores, pairs, predicates, scores, best

    def _encode(
        self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor, size: Tensor
    ) -> EntityBatch:
        """As the head's own, but no number of detections is written into the graph."""
        head = self.model.relation_head
        subject_vectors = object_vectors = None
        if head.entity_pooler is not None:
            pooled = head.entity_pooler([features[x] for x in head.in_features], [Boxes(boxes)])
            if head.subject_box_head is not None:
                subject_vectors = head.subject_box_head(pooled)
            if head.object_box_head is not None:
                object_vectors = head.object_box_head(pooled)
        image = torch.zeros_like(classes)
        return EntityBatch(boxes, classes, image, size, [0], subject_vectors, object_vectors)


@contextmanager
def _without_gradient_scaling() -> Iterator[None]:
    """Cascade R-CNN scales gradients in a Python function, which no file can hold, but no value."""
    kept = getattr(cascade_rcnn, "_ScaleGradient", None)
    if kept is None:
        yield
        return
    cascade_rcnn._ScaleGradient = SimpleNamespace(apply=lambda values, scale: values)
    try:
        yield
    finally:
        cascade_rcnn._ScaleGradient = kept


def all_pairs(boxes: Tensor, overlap_filter: bool) -> tuple[Tensor, Tensor]:
    """Ordered pairs (i, j), i != j, of R boxes, as two (P,) index tensors."""
    number = torch.arange(boxes.shape[0], device=boxes.device)
    chosen = number[:, None] != number[None]
    if overlap_filter:
        low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        chosen = chosen & ((high - low).clamp(min=0).prod(dim=2) > 0)
    pairs = chosen.nonzero()
    return pairs[:, 0], pairs[:, 1]


def rank_everything(
    probabilities: Tensor, pair_scores: Tensor, predicates_per_pair: Sequence[int], topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :class:`.inference.TopTriplets`, in operations that any number of pairs goes through.

    Args:
        probabilities: (P, C), without "no relationship".
        pair_scores: (P,), ``p_det(s) * p_det(o)``.
        predicates_per_pair, topk: see :class:`.inference.TopTriplets`.

    Returns:
        (K,) pair, (K,) predicate and (K,) score, in descending order of the score; equal scores by
        pair, then predicate.
    """
    num_predicates = probabilities.shape[1]
    scores = (probabilities * pair_scores[:, None]).flatten()
    best_first = probabilities.argsort(dim=1, descending=True, stable=True)
    rank = best_first.argsort(dim=1).flatten()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for k in predicates_per_pair:
        allowed = scores.masked_fill(rank >= k, -1.0) if k else scores
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

    The file holds ``reldn.json`` as an extra file: ``thing_classes``, ``predicate_classes``,
    ``input`` (shape), ``input_format`` and ``outputs`` (names).

    Args:
        model: with its weights.
        example: (3, H, W) image; the file takes images of just this size. At least two entities
            must be found in it, so that every part of the model is seen at work.
        path: of the file.
        thing_classes, predicate_classes: names by id.
        image_format: order of the channels.

    Returns:
        the eager model's outputs on the example.

    Raises:
        ValueError: fewer than two entities are found in the example.
        OSError: the file cannot be written.
    """
    exportable = RelDNExport(model, example.shape).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing tells of every size that it takes as fixed; the images' is, by contract.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        expected = exportable(example)
        if len(expected[0]) < 2 or len(expected[3]) < 1:
            raise ValueError(
                f"{len(expected[0])} entities are found in the example image, with "
                f"{len(expected[3])} relations; give one that shows at least one relation"
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
        with write_atomically(str(path), "wb") as file:
            torch.jit.save(traced, file, _extra_files=extra)
    return list(expected)
