"""The entities of a batch, as the relation head reads them.

Shapes: N images, R entities of the whole batch, d numbers an ROI vector. Boxes are XYXY in pixels
of the network's input.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes

__all__ = ["EntityBatch"]


@dataclass
class EntityBatch:
    """The entities of all images, one after another, each encoded once.

    Attributes:
        boxes: (R, 4).
        classes: (R,) int64.
        image: (R,) int64, index of the entity's image.
        image_sizes: (N, 2) height and width.
        sizes: number of entities of each of the N images.
        subject_vectors, object_vectors: (R, d), or None where nothing reads them.
    """

    boxes: Tensor
    classes: Tensor
    image: Tensor
    image_sizes: Tensor
    sizes: List[int]
    subject_vectors: Optional[Tensor]
    object_vectors: Optional[Tensor]

    @classmethod
    def stack(
        cls,
        boxes: List[Boxes],
        classes: List[Tensor],
        image_sizes: List[Tuple[int, int]],
        subject_vectors: Optional[Tensor] = None,
        object_vectors: Optional[Tensor] = None,
    ) -> "EntityBatch":
        """Join images.

        Args:
            boxes, classes, image_sizes: of each image; sizes are (height, width).
            subject_vectors, object_vectors: of all entities, in the same order.
        """
        sizes = [len(x) for x in boxes]
        stacked = torch.cat([x.tensor for x in boxes])
        device = stacked.device
        return cls(
            boxes=stacked,
            classes=torch.cat(classes),
            image=torch.arange(len(sizes), device=device).repeat_interleave(
                torch.tensor(sizes, device=device), output_size=sum(sizes)
            ),
            image_sizes=torch.tensor(image_sizes, device=device, dtype=stacked.dtype).view(-1, 2),
            sizes=sizes,
            subject_vectors=subject_vectors,
            object_vectors=object_vectors,
        )
