"""Object detectors of Hugging Face's ``transformers`` (DETR, RT-DETR, YOLOS, ...)."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["PREFIX", "build_transformers_detector"]

PREFIX = "transformers:"


def build_transformers_detector(
    name: str, device: str, class_names: Sequence[str] | None = None
) -> tuple[Callable[[np.ndarray], tuple[Tensor, Tensor, Tensor]], Sequence[str], nn.Module]:
    """Load a detector with the image processor that belongs to it.

    Args:
        name: a folder that ``save_pretrained`` of model and image processor wrote, or a name on the
            Hugging Face hub, such as ``facebook/detr-resnet-50``.
        device: such as ``cpu``.
        class_names: names by class id; None for those of the model's config.

    Returns:
        A function of an (H, W, 3) uint8 RGB image that returns boxes (R, 4), class ids (R,) and
        scores (R,), R being the number of queries; the names by class id; and the model.

    Raises:
        ImportError: ``transformers`` is not installed.
        FileNotFoundError: there is no such folder, or the hub cannot be reached.
        ValueError: the model is not an object detector, or its classes have no names.
    """
    what = f"detector {PREFIX}{name}"
    try:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(
            f"{what} needs the package transformers ({reason}): pip install transformers"
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModelForObjectDetection.from_pretrained(name)
    except OSError as error:  # transformers raises it for whatever cannot be found or fetched
        reason = " ".join(str(error).split())[:300]
        advice = "Its folder needs config.json, preprocessor_config.json and model.safetensors."
        if not os.path.isdir(name):
            advice = (
                "There is no such folder; a model of the hub is downloaded at the first use. "
                "Without network, copy its folder from another machine and give the path."
            )
        raise FileNotFoundError(f"{what}: {reason} {advice}") from error
    except (ValueError, ImportError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:300]}") from error
    names = class_names or _names_of(model.config.id2label)
    count = model.config.num_labels
    if not names or len(names) != count:
        problem = (
            f"{len(names)} names for {count} classes" if names else "its classes have no names"
        )
        raise ValueError(
            f"{what}: {problem}. Give class_names, or write them into id2label of its config.json."
        )
    model = model.eval().to(device)

    def detect(rgb: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        height, width = rgb.shape[:2]
        inputs = processor(images=Image.fromarray(rgb), return_tensors="pt").to(device)
        found = processor.post_process_object_detection(
            model(**inputs), threshold=0.0, target_sizes=[(height, width)]
        )[0]
        limits = torch.tensor([width, height] * 2, device=found["boxes"].device)
        boxes = found["boxes"].clamp(min=0).minimum(limits)
        return boxes, found["labels"], found["scores"]

    return detect, names, model


def _names_of(id2label: dict[int, str]) -> list[str] | None:
    """Return names by id; None if they are the placeholders ``LABEL_0``, ``LABEL_1``, ...."""
    names = [id2label[i] for i in sorted(id2label)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names
