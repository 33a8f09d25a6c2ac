"""Models that come with the package, and detectors of other packages whose boxes they take."""

from .image_detectors import load_detector
from .weights import PRETRAINED, pretrained_file

__all__ = ["PRETRAINED", "load_detector", "pretrained_file"]
