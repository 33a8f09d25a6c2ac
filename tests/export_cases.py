"""Inputs for tests of exported models."""

from pathlib import Path

import numpy as np
import torch
from lazy_files import write_lazy_detector
from model_utils import small_model
from torch import Tensor
from usage_utils import picture

# Code after that of a detector's LazyConfig: a backbone that pads images to 80 x 80.
PADS = """
class Padded(FPN):
    padding_constraints = {"size_divisiblity": 32, "square_size": 80}
model.backbone._target_ = Padded
"""


def image(height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    """Return a (3, height, width) image in [0, 255]."""
    pixels = picture(height, width, seed).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).float()


def entities(
    count: int, height: int = 64, width: int = 96, num_classes: int = 9, beyond: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random boxes, classes and scores.

    Args:
        count, height, width, num_classes: of the entities and of the image.
        beyond: pixels by which boxes may extend beyond the image.
    """
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(dim=1) - beyond, corners.amax(dim=1) + 1 + beyond], dim=1)
    if not beyond:
        boxes = torch.minimum(boxes, torch.tensor([width, height, width, height]))
    classes = torch.randint(0, num_classes, (count,), generator=generator)
    return boxes, classes, torch.rand(count, generator=generator)


def fcos_model(folder: Path) -> torch.nn.Module:
    """Build a RelDN on a small FCOS whose boxes overlap; ``folder`` gets its LazyConfig."""
    path = write_lazy_detector(folder, "fcos")
    model = small_model("MODEL.RELDN.DETECTOR_LAZY_CONFIG", str(path))
    torch.nn.init.constant_(model.detector.model.head.bbox_pred.bias, 3.0)
    return model


def square_model(folder: Path) -> torch.nn.Module:
    """Build a RelDN whose detector pads images to 80 x 80; ``folder`` gets its LazyConfig."""
    path = write_lazy_detector(folder, "faster_rcnn", PADS)
    sizes = ("INPUT.MAX_SIZE_TRAIN", 80, "INPUT.MAX_SIZE_TEST", 80)
    return small_model("MODEL.RELDN.DETECTOR_LAZY_CONFIG", str(path), *sizes)
