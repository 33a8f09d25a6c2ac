"""The functions that are exported: from tensors to the relations of one image, as tensors.

They are the eager model, except that they score all pairs: the eager search for the top triplets
stops early depending on the scores, which a traced graph cannot do.

Shapes: R entities, K relations, P pairs, C predicates. Boxes are XYXY in pixels of the input.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.layers import shapes_to_tensor
from detectron2.structures import Boxes, Instances

from ..modeling.detectors import PrecomputedDetector
from ..modeling.detectors.base import square_size
from ..modeling.meta_arch import RelDN
from ..modeling.relation_head import RelDNHead
from ..modeling.relation_head.pairs import EntityBatch, candidate_pairs

__all__ = ["OUTPUT_NAMES", "ExportedGraph", "GivenBoxesExport", "RelDNExport", "rank_triplets"]

RELATION_NAMES = (
    "pairs",  # (K, 2) int64, subject and object index into the boxes
    "predicates",  # (K,) int64
    "scores",  # (K,), descending
    "predicate_scores",  # (K,)
)
OUTPUT_NAMES = (
    "boxes",  # (R, 4)
    "classes",  # (R,) int64
    "box_scores",  # (R,)
    *RELATION_NAMES,
)

# Methods that the graphs do without, or write out in their own way.
FIXED_STEPS = {
    RelDN: ("inference", "_entities"),
    RelDNHead: ("forward", "_predict", "encode_entities"),
}

# Layers of Detectron2 that run Python code or operators of its own.
NOT_EXPORTABLE = {
    "DeformConv": "neither TorchScript nor ONNX has Detectron2's deformable convolution",
    "ModulatedDeformConv": "neither TorchScript nor ONNX has Detectron2's deformable convolution",
    "ROIAlignRotated": "neither TorchScript nor ONNX has RoIAlign for rotated boxes",
}


class ExportedGraph(nn.Module):
    """What both graphs share; inputs and outputs are tensors only.

    Attributes:
        input_names, output_names: of the tensors, in their order.
        dynamic_axes: of each input that has some, the names of its dimensions of any size.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_axes: dict[str, dict[int, str]]

    def __init__(self, model: RelDN, size: Sequence[int] | None = None):
        """
        Args:
            model: with its weights; it is put into eval mode.
            size: (height, width), the only size of images that is accepted; None accepts any.

        Raises:
            TypeError: if its relation head or its detector cannot be exported.
            ValueError: if its logits are to be adjusted by unknown counts, or its detector runs in
                bf16.
        """
        super().__init__()
        if not isinstance(model.relation_head, RelDNHead):
            name = type(model.relation_head).__name__
            raise TypeError(f"only RelDNHead and its subclasses can be exported, not {name}")
        model.relation_head.check_counts()
        for module, base in ((model, RelDN), (model.relation_head, RelDNHead)):
            for step in FIXED_STEPS[base]:
                if getattr(type(module), step) is not getattr(base, step):
                    raise TypeError(
                        f"{type(module).__name__} overrides {step}, but an exported graph has that "
                        f"step of {base.__name__}: such a model cannot be exported"
                    )
        if model.detector_precision == "bf16":
            raise ValueError(
                "MODEL.RELDN.DETECTOR_PRECISION is 'bf16', but an exported file computes in "
                "float32: pass --opts MODEL.RELDN.DETECTOR_PRECISION float32"
            )
        for name, module in model.named_modules():
            reason = NOT_EXPORTABLE.get(type(module).__name__)
            if reason and not self._leaves_out(name):
                raise TypeError(
                    f"{name} is a {type(module).__name__}, which cannot be exported: {reason}"
                )
        self.model = model
        self.eval()
        self.size = None if size is None else tuple(size)
        self.dynamic_axes = {} if size is not None else {"image": {1: "height", 2: "width"}}

    @staticmethod
    def _leaves_out(name: str) -> bool:
        """Tell whether the graph has no use for the module or weight of this name."""
        return False

    def weights(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers that the graph needs."""
        for name, weight in self.model.state_dict().items():
            if not self._leaves_out(name):
                yield weight

    def model_outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the model itself predicts, in the order of ``output_names``.

        Args:
            inputs: as for the graph.
        """
        batched_input, task = self._batched_input(*inputs)
        before, self.model.task = self.model.task, task
        try:
            with torch.no_grad():
                output = self.model.inference([batched_input], do_postprocess=False)[0]
        finally:
            self.model.task = before
        found, relations = output["instances"], output["relations"]
        fields = dict(boxes=found.pred_boxes.tensor, classes=found.pred_classes)
        fields.update(box_scores=found.scores, **relations.get_fields())
        return tuple(fields[name] for name in self.output_names)

    def _batched_input(self, *inputs: Tensor) -> tuple[dict[str, Any], str]:
        """Return the inputs as the model takes them, and the task."""
        raise NotImplementedError

    def _feature_maps(self, image: Tensor):
        """Compute what the detector and the head read of a (3, H, W) image."""
        if self.size is not None:
            image = image.expand(3, *self.size)  # fails for another size, in a traced graph too
        side = square_size(self.model.detector.backbone)
        for length in image.shape[1:] if side else ():
            # Fails for a larger image, in a traced graph too, which would cut it off.
            image = image + image.new_zeros(side - length).sum()
        images = self.model.detector.preprocess([{"image": image}])
        return images, *self.model.feature_maps(images)

    def _relations(
        self,
        features: dict[str, Tensor],
        maps: dict[str, Tensor] | None,
        entities: Instances,
        image_size: Tensor,
        given: bool,
    ) -> tuple[Instances, tuple[Tensor, ...]]:
        """Rank the relations of entities.

        Args:
            features, maps: of the detector and of the predicate backbone.
            entities: R, with ``pred_boxes``, ``pred_classes`` and ``scores``.
            image_size: (1, 2) height and width.
            given: whether boxes and classes are given: classes then stay, and the overlap filter
                does not apply.

        Returns:
            The entities as the head refined them, and tensors in the order of ``RELATION_NAMES``.
        """
        head, boxes = self.model.relation_head, entities.pred_boxes.tensor
        encoded = self._encode(features, boxes, entities.pred_classes, image_size)
        encoded, entities = head.refine(encoded, entities, classes_given=given)
        candidates = candidate_pairs(boxes, head.overlap_filter and not given)
        subjects, objects = candidates.nonzero().unbind(1)
        logits = head.score_pairs(encoded, maps, subjects, objects)
        probabilities = head.prior(logits)[:, :-1]  # without "no relationship"
        factors = head.entity_factors(entities.scores)
        pair_scores = factors[subjects] * factors[objects]
        pair_index, predicates, scores = rank_triplets(
            probabilities, pair_scores, head.predicates_per_pair, head.topk
        )
        pairs = torch.stack([subjects[pair_index], objects[pair_index]], dim=1)
        return entities, (pairs, predicates, scores, probabilities[pair_index, predicates])

    def _encode(
        self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor, size: Tensor
    ) -> EntityBatch:
        """Encode entities as the head does, but for any number of entities when traced."""
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


class RelDNExport(ExportedGraph):
    """Detects entities in an image and predicts their relations (SGDET)."""

    input_names = ("image",)
    output_names = OUTPUT_NAMES

    def __init__(self, model: RelDN, size: Sequence[int] | None = None):
        """See :class:`ExportedGraph`."""
        super().__init__(model, size)
        if isinstance(model.detector, PrecomputedDetector):
            raise TypeError(
                "a model whose detections come from files cannot be exported as a detector: "
                "use --given-boxes (GivenBoxesExport)"
            )
        if getattr(model.detector.model, "proposal_generator", self) is None:
            raise TypeError(
                "a detector whose proposals come from files cannot be exported: use --given-boxes "
                "(GivenBoxesExport)"
            )

    def _batched_input(self, image: Tensor) -> tuple[dict[str, Any], str]:
        return {"image": image}, "sgdet"

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Predict one image.

        Args:
            image: (3, H, W) in [0, 255], channels in the order of the config's ``INPUT.FORMAT``.

        Returns:
            tensors in the order of ``OUTPUT_NAMES``.
        """
        images, features, maps = self._feature_maps(image)
        detections = self.model.detector.detect([{"image": image}], images, features)[0]
        size = shapes_to_tensor(image.shape[-2:]).to(image)[None]
        found, relations = self._relations(features, maps, detections, size, given=False)
        return found.pred_boxes.tensor, found.pred_classes, found.scores, *relations


class GivenBoxesExport(ExportedGraph):
    """Predicts the relations of given boxes with classes (PRDCLS).

    A model that reads no pixels takes the image's size instead of the image.
    """

    output_names = RELATION_NAMES

    @staticmethod
    def _leaves_out(name: str) -> bool:
        return name.startswith("detector.") and not name.startswith("detector.model.backbone.")

    def __init__(self, model: RelDN, size: Sequence[int] | None = None):
        """See :class:`ExportedGraph`; ``size`` must be None if the model reads no pixels."""
        super().__init__(model, size)
        entities = ("boxes", "classes", "box_scores")
        self.reads_images = model.detector.reads_images
        if self.reads_images:
            self.input_names = ("image", *entities)
        else:
            self.input_names = (*entities, "image_size")
            self.dynamic_axes = {}
        self.dynamic_axes.update({name: {0: "entities"} for name in entities})

    def _batched_input(self, *inputs: Tensor) -> tuple[dict[str, Any], str]:
        given = dict(zip(self.input_names, inputs))
        size = given["image"].shape[-2:] if self.reads_images else given["image_size"].tolist()
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(given["boxes"].clone())
        instances.gt_boxes.clip(instances.image_size)
        instances.gt_classes, instances.scores = given["classes"], given["box_scores"]
        image = {"image": given["image"]} if self.reads_images else {}
        return {"instances": instances, **image}, "prdcls"

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Predict one image.

        Args:
            inputs: in the order of ``input_names``:

                * ``image``: (3, H, W) in [0, 255], channels in the order of ``INPUT.FORMAT``;
                * ``boxes``: (R, 4) in pixels of the image; the part within it is used;
                * ``classes``: (R,) int64;
                * ``box_scores``: (R,) in [0, 1];
                * ``image_size``: (2,) int64 height and width.

        Returns:
            tensors in the order of ``RELATION_NAMES``.
        """
        given = dict(zip(self.input_names, inputs))
        boxes, features, maps = given["boxes"], {}, None
        if self.reads_images:
            _, features, maps = self._feature_maps(given["image"])
            image_size = shapes_to_tensor(given["image"].shape[-2:])
        else:
            image_size = given["image_size"]
        image_size = image_size.to(boxes)[None]
        limits = image_size.flip(1).repeat(1, 2)
        entities = Instances((0, 0))  # whose size is not read
        entities.pred_boxes = Boxes(torch.minimum(boxes.clamp(min=0), limits))
        entities.pred_classes = given["classes"]
        entities.scores = given["box_scores"]
        return self._relations(features, maps, entities, image_size, given=True)[1]


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
    first_of_pair = torch.arange(probabilities.shape[0], device=scores.device)[:, None]
    first_of_pair = first_of_pair * num_predicates
    limits = {num_predicates if k is None else min(k, num_predicates) for k in predicates_per_pair}
    found = []
    for k in sorted(limits):
        if k == 1:
            best = probabilities.argmax(dim=1, keepdim=True)
        else:  # in ascending order, so that equal scores stay ordered by predicate
            best = probabilities.argsort(dim=1, descending=True, stable=True)[:, :k]
            best = best.sort(dim=1).values
        triplets = (first_of_pair + best).flatten()
        order = scores[triplets].argsort(descending=True, stable=True)[:topk]
        found.append(triplets[order])
    chosen = found[0]
    if len(found) > 1:  # found for any limit; unique() sorts them
        chosen = torch.cat(found).unique()
        chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
    pairs = torch.div(chosen, num_predicates, rounding_mode="floor")
    return pairs, chosen - pairs * num_predicates, scores[chosen]
