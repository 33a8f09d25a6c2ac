"""Random input of real sizes: datasets, FPN feature maps and a relation head of the paper's size.

Classes, predicates and predictions are as unevenly distributed as in scene graphs, where the n-th
most frequent one is about 1/n as frequent as the first.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reldn_d2 import add_reldn_config
from reldn_d2.modeling.relation_head import RelDNHead, build_relation_head
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, BoxMode, Instances

__all__ = [
    *("IMAGE_SIZE", "Shapes", "add_shape_arguments", "boxes_near", "build_head", "draw_dataset"),
    *("draw_images", "feature_maps", "frequencies", "long_tail"),
]

IMAGE_SIZE = (768, 1024)  # height and width of the drawn dataset's images
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def frequencies(count: int) -> Tensor:
    """Return 1, 1/2, 1/3, ..."""
    return 1.0 / torch.arange(1, count + 1)


def long_tail(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Draw ``size`` ids below ``count`` with those frequencies."""
    weights = frequencies(count).double().numpy()
    return rng.choice(count, size, p=weights / weights.sum())


def draw_dataset(
    num_images: int,
    num_relations: int,
    num_classes: int,
    num_predicates: int,
    boxes_per_image: tuple[int, int] = (4, 24),
) -> list[dict[str, Any]]:
    """Draw Detectron2 dataset dicts with ``"relations"``.

    Every image has a relation if there are enough; the others are spread at random. Boxes have
    integer corners inside their image; ``boxes_per_image`` is a range that excludes its end.
    """
    rng = np.random.default_rng(0)
    box_counts = rng.integers(*boxes_per_image, num_images)
    spread = rng.integers(0, num_images, max(num_relations - num_images, 0))
    image_of_relation = np.sort(np.concatenate([np.arange(num_images)[:num_relations], spread]))
    low = rng.integers(0, 400, (box_counts.sum(), 2))
    boxes = np.concatenate([low, low + rng.integers(10, 300, low.shape)], axis=1).astype(float)
    classes = long_tail(rng, num_classes, len(boxes))
    entities = box_counts[image_of_relation]
    subjects = rng.integers(0, entities)
    objects = (subjects + rng.integers(1, entities)) % entities
    predicates = long_tail(rng, num_predicates, num_relations)
    relations = np.stack([subjects, objects, predicates], axis=1)

    first_box = np.cumsum(box_counts)[:-1]
    first_relation = np.searchsorted(image_of_relation, np.arange(1, num_images))
    parts: Sequence[list[np.ndarray]] = (
        np.split(boxes, first_box),
        np.split(classes, first_box),
        np.split(relations, first_relation),
    )
    height, width = IMAGE_SIZE
    dicts = []
    # Visual Genome's four corrupt images have small ids, which its loader leaves out.
    for image_id, (own_boxes, own_classes, own_relations) in enumerate(zip(*parts), 2_000_000):
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": 0}
            for box, category in zip(own_boxes.tolist(), own_classes.tolist())
        ]
        dicts.append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.jpg",
                "height": height,
                "width": width,
                "annotations": annotations,
                "relations": list(map(tuple, own_relations.tolist())),
            }
        )
    return dicts


class Shapes(NamedTuple):
    """Sizes of the network's input and of the relation head's layers."""

    size: tuple[int, int]
    channels: int
    pooler_resolution: int
    fc_dim: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Shapes":
        """Take the options that :func:`add_shape_arguments` adds."""
        return cls(*(getattr(args, field) for field in cls._fields))


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and an option for each field of :class:`Shapes`."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="height and width")
    parser.add_argument("--channels", type=int, default=256, help="of the feature maps")
    parser.add_argument("--pooler-resolution", type=int, default=7, help="of RoIAlign")
    parser.add_argument("--fc-dim", type=int, default=1024, help="width of the box heads")


def feature_maps(shapes: Shapes, device: str, seed: int) -> dict[str, Tensor]:
    """Draw the FPN maps of one image, which is padded to a multiple of 32."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (-(-side // 32) * 32 for side in shapes.size)
    return {
        name: torch.randn(
            (1, shapes.channels, height // stride, width // stride), generator=generator
        ).to(device)
        for name, stride in STRIDES.items()
    }


def build_head(
    shapes: Shapes, device: str, num_classes: int = 150, num_predicates: int = 50
) -> RelDNHead:
    """Build RelDN's head with random weights on FPN maps; it never logs training statistics."""
    cfg = get_cfg()
    add_reldn_config(cfg)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(STRIDES)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = shapes.fc_dim
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = shapes.pooler_resolution
    cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES = num_predicates
    cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER = False
    cfg.MODEL.ROI_RELATION_HEAD.LOSS.NORMALIZATION = "released_code"
    features = {name: ShapeSpec(channels=shapes.channels, stride=x) for name, x in STRIDES.items()}
    torch.manual_seed(0)
    head = build_relation_head(cfg, features, features).to(device)
    with torch.no_grad():  # uneven, like counted frequencies
        head.semantic.table.weight.normal_()
        head.semantic.table.weight[:, :-1] += frequencies(num_predicates).log().to(device)
    head.statistics_period = 10**9
    return head


def draw_images(
    num_images: int, size: tuple[int, int], num_classes: int, num_predicates: int
) -> list[dict[str, Any]]:
    """Draw mapped training images: random pixels, 16 boxes and 20 relations each.

    The sides of the boxes are between 60 and 300 pixels in images of 800 pixels.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    num_targets, num_relations = 16, 20
    images = []
    for index in range(num_images):
        sides = (60 + 240 * torch.rand((num_targets, 2), generator=generator)) * height / 800
        free = (torch.tensor([width, height]) - sides).clamp(min=0)
        low = torch.rand((num_targets, 2), generator=generator) * free
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1))
        instances.gt_classes = frequencies(num_classes).multinomial(
            num_targets, True, generator=generator
        )
        grid = torch.ones((num_targets, num_targets)).fill_diagonal_(0).nonzero()
        pairs = grid[torch.randperm(len(grid), generator=generator)[:num_relations]]
        predicates = frequencies(num_predicates).multinomial(
            num_relations, True, generator=generator
        )
        relations = torch.cat([pairs, predicates[:, None]], dim=1).tolist()
        pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        images.append(
            {
                "image": pixels,
                "image_id": index,
                "instances": instances,
                "relations": ground_truth_relations(relations, tuple(size)),
                "height": height,
                "width": width,
            }
        )
    return images


def boxes_near(targets: Boxes, count: int, seed: int = 0) -> Boxes:
    """Draw boxes whose corners differ from those of the targets by up to a tenth of their sides."""
    generator = torch.Generator().manual_seed(seed)
    boxes = targets.tensor[torch.arange(count) % len(targets)]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.rand((count, 4), generator=generator).to(boxes.device) - 0.5
    return Boxes(boxes + 0.2 * noise * sides)
