"""What the benchmark of inference is run on: detections of an image and their probabilities."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reldn_d2.data.frequency import count_predicates, log_frequencies
from reldn_d2.modeling.relation_head import RelDNHead

from detectron2.structures import BoxMode

__all__ = ["Detections", "alike_detections", "toy_detections", "vrd_detections"]

IMAGE_SIZE, NUMBER = (800, 1333), 100  # of the network's input; detections of an image


class Detections(NamedTuple):
    """Of one image: R scores, boxes in the frame of the network's input, and probabilities."""

    scores: Tensor  # (R,)
    boxes: Tensor  # (R, 4)
    probabilities: Tensor  # (R, R, C) of each ordered pair's predicates


def toy_detections(checkpoint: Path, number: int) -> list[Detections]:
    """What a model trained on the built-in set finds in its test images: 100 detections each."""
    from reldn_d2.predictor import RelationPredictor

    from detectron2.data import DatasetCatalog

    options = ["TEST.DETECTIONS_PER_IMAGE", NUMBER, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    predictor = RelationPredictor.from_checkpoint(checkpoint, device="cpu", opts=options)
    head, found = predictor.model.relation_head, []

    def keep(self, features, predicate_features, entities) -> list[Any]:
        for instances in entities:
            boxes, count = instances.pred_boxes, len(instances)
            encoded = self.encode_entities(
                features, [boxes], [instances.pred_classes], [instances.image_size]
            )
            s, o = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
            logits = self.pair_logits(encoded, predicate_features, s.flatten(), o.flatten())
            table = logits.softmax(dim=1)[:, :-1].reshape(count, count, -1)
            height, width = instances.image_size
            scale = torch.tensor([IMAGE_SIZE[1] / width, IMAGE_SIZE[0] / height]).repeat(2)
            found.append(Detections(instances.scores, boxes.tensor * scale, table))
        return RelDNHead.forward(self, features, predicate_features, entities)

    head.forward = keep.__get__(head)
    for record in DatasetCatalog.get("toy_vrd_test")[:number]:
        predictor(record["file_name"])
    return found


def vrd_detections(
    detections: Path, annotations: Path, number: int, lowest: bool
) -> list[Detections]:
    """Published detections padded to 100, with the frequencies of the training annotations.

    Args:
        detections: COCO results with ``category_id`` as in VRD's objects.json.
        annotations: VRD's annotations_train.json.
        number: images.
        lowest: pad with scores of 0.05, the least that a detector reports; otherwise with scores
            that fall in equal ratios from the image's lowest one to 0.05.
    """
    generator = torch.Generator().manual_seed(0)
    counts = count_predicates(read_relations(annotations), 100, 70, overlap_filter=False)
    table = log_frequencies(counts).softmax(dim=-1)[..., :-1]
    by_image: dict[str, list[dict[str, Any]]] = {}
    records = json.loads(detections.read_text())
    for record in records:
        by_image.setdefault(record["image_id"], []).append(record)
    all_classes = torch.tensor([record["category_id"] for record in records])
    height, width = IMAGE_SIZE
    result = []
    for found in list(by_image.values())[:number]:
        boxes = torch.tensor([x["bbox"] for x in found])
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes * min(height, width) / boxes.max()
        missing = NUMBER - len(found)
        low = torch.rand((missing, 2), generator=generator) * torch.tensor([width, height]) * 0.8
        sides = torch.rand((missing, 2), generator=generator) * torch.tensor([width, height]) * 0.4
        extra = torch.cat([low, low + sides + 8], dim=1)
        scores = torch.tensor([x["score"] for x in found])
        least = 0.05 if lowest else float(scores.min())
        steps = torch.linspace(0, 1, missing + 1)[1:]
        padding = least * (0.05 / least) ** steps
        drawn = torch.randint(len(all_classes), (missing,), generator=generator)
        classes = torch.cat([torch.tensor([x["category_id"] for x in found]), all_classes[drawn]])
        probabilities = table[classes[:, None], classes[None]]
        result.append(
            Detections(torch.cat([scores, padding]), torch.cat([boxes, extra]), probabilities)
        )
    return result


def read_relations(annotations: Path) -> list[dict[str, Any]]:
    """Dataset dicts, without images, of a file in VRD's shape: enough to count predicates."""
    dicts = []
    for relations in json.loads(annotations.read_text()).values():
        entities: dict[tuple, int] = {}
        triplets = []
        for relation in relations:
            ends = [
                entities.setdefault((x["category"], *x["bbox"]), len(entities))
                for x in (relation["subject"], relation["object"])
            ]
            if ends[0] != ends[1]:  # a few have the same box at both ends
                triplets.append((*ends, relation["predicate"]))
        records = [
            {"category_id": c, "bbox": [x0 - 1, y0 - 1, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
            for c, y0, y1, x0, x1 in entities
        ]
        dicts.append({"annotations": records, "relations": triplets})
    return dicts


def alike_detections(lowest: float) -> Detections:
    """The worst case: scores from ``lowest`` to 1, so that the bound tells pairs hardly apart."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]])
    low = torch.rand((NUMBER, 2), generator=generator) * size * 0.6
    boxes = torch.cat(
        [low, low + 8 + torch.rand((NUMBER, 2), generator=generator) * size * 0.35], 1
    )
    probabilities = torch.rand((NUMBER, NUMBER, 9), generator=generator) / 9
    return Detections(torch.linspace(lowest, 1, NUMBER), boxes, probabilities)
