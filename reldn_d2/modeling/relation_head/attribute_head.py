"""Attribute head: scores the attributes of each entity from its vectors. Not in the paper.

Shapes: R entities of the batch, A attributes, d values per entity.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances

__all__ = ["AttributeHead", "attribute_loss", "build_attribute_head"]

_KEY = "MODEL.ROI_ATTRIBUTE_HEAD"


class AttributeHead(nn.Module):
    """A small network with one sigmoid per attribute, so that an entity may have any number."""

    @configurable
    def __init__(
        self, *, vector_size: int, num_attributes: int, hidden_dim: int, loss_weight: float
    ):
        """
        Args:
            vector_size: d.
            num_attributes: A.
            hidden_dim: units of the hidden layer; 0 leaves it out.
            loss_weight: factor of the loss.

        Raises:
            ValueError: if there are no attributes or no vectors.
        """
        super().__init__()
        if num_attributes < 1:
            raise ValueError(
                f"{_KEY}.NUM_ATTRIBUTES is {num_attributes}; set it to the number of "
                "attribute_classes of the dataset, or ENABLED to False."
            )
        if not vector_size:
            raise ValueError(
                f"{_KEY} reads the vectors that the visual module computes of each entity, and "
                "MODEL.ROI_RELATION_HEAD.VISUAL is off: classes and boxes alone do not show "
                "attributes such as colors. Switch on a part of VISUAL, or the attribute head off."
            )
        self.num_attributes = num_attributes
        self.loss_weight = loss_weight
        self.hidden = nn.Linear(vector_size, hidden_dim) if hidden_dim else None
        self.classifier = nn.Linear(hidden_dim or vector_size, num_attributes)

    @classmethod
    def from_config(cls, cfg: CfgNode, vector_size: int) -> dict[str, Any]:
        head = cfg.MODEL.ROI_ATTRIBUTE_HEAD
        return {
            "vector_size": vector_size,
            "num_attributes": head.NUM_ATTRIBUTES,
            "hidden_dim": head.HIDDEN_DIM,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(self, vectors: Tensor) -> Tensor:
        """Score entities: (R, d) to (R, A) logits."""
        if self.hidden is not None:
            vectors = F.leaky_relu(self.hidden(vectors), 0.1)
        return self.classifier(vectors)

    def losses(self, vectors: Tensor, entities: list[Instances]) -> dict[str, Tensor]:
        """Compute the weighted loss, by name.

        Args:
            vectors: (R, d) of the training entities of all images.
            entities: of each image, with ``gt_attributes`` and ``gt_attributes_known``, those of
                the ground-truth box that the entity matches.

        Raises:
            ValueError: if the entities have no such fields.
        """
        if not all(x.has("gt_attributes") for x in entities):
            raise ValueError(
                f"{_KEY}.ENABLED is True, but the training images have no attributes: the dataset "
                "needs attribute_classes in its metadata (docs/own_data.md), and the mapper must "
                "be reldn_d2.data.RelationDatasetMapper."
            )
        logits = self(vectors)
        targets = torch.cat([x.gt_attributes for x in entities])
        known = torch.cat([x.gt_attributes_known for x in entities])
        return {"loss_attributes": self.loss_weight * attribute_loss(logits, targets, known)}

    def predict(self, vectors: Tensor) -> Tensor:
        """Return (R, A) scores in [0, 1]."""
        return self(vectors).float().sigmoid()


def attribute_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over all attributes of the known entities.

    Entities that nobody has annotated attributes of contribute nothing: in OpenImages and Visual
    Genome these are most entities, and many of them have attributes.

    Args:
        logits: (R, A).
        targets: (R, A) bool.
        known: (R,) bool.

    Returns:
        A scalar; 0, with a gradient of 0, if no entity is known.
    """
    logits = logits[known].float()
    if logits.numel() == 0:
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits, targets[known].to(logits.dtype))


def build_attribute_head(cfg: CfgNode, vector_size: int) -> AttributeHead | None:
    """Build the attribute head of a config; None if it is off.

    Args:
        cfg: config with ``MODEL.ROI_ATTRIBUTE_HEAD``.
        vector_size: values per entity, 0 if there are no vectors.
    """
    return AttributeHead(cfg, vector_size) if cfg.MODEL.ROI_ATTRIBUTE_HEAD.ENABLED else None
