"""Entity contexts: from the entities of an image to a vector of each that knows of the others.

Shapes: N images, R entities of the batch, L entities of the largest image, K entity classes, H
values per contextual vector.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry

from ...utils.registry import build_registered
from .pairs import EntityBatch
from .predictors import box_position

__all__ = [
    *("ENTITY_CONTEXT_REGISTRY", "EntityContext", "LSTMContext", "TransformerContext"),
    *("build_entity_context", "from_rows", "to_rows"),
]

ENTITY_CONTEXT_REGISTRY = Registry("ENTITY_CONTEXT")
ENTITY_CONTEXT_REGISTRY.__doc__ = """
Registry for contexts of entities, subclasses of :class:`EntityContext`.

The registered object is called with ``obj(cfg, vector_size)``: the size of an entity's vectors as
a subject and as an object together, 0 if no module reads pixels.
"""

NO_CONTEXT = "none"
_EMBEDDING_STD = 0.1  # as in the joint module: classes start out alike
_POSITION_SIZE = 5


class EntityContext(nn.Module, ABC):
    """Lets the entities of an image exchange what is known of each. A subclass has `forward`.

    Without a visual module there are no entity vectors. A context then starts from classes and
    boxes alone.
    """

    @configurable
    def __init__(self, *, num_classes: int, vector_size: int, hidden_dim: int):
        """
        Args:
            num_classes: K.
            vector_size: see :data:`ENTITY_CONTEXT_REGISTRY`.
            hidden_dim: H.

        Raises:
            ValueError: if ``hidden_dim`` is not positive.
        """
        super().__init__()
        _check("HIDDEN_DIM", hidden_dim, hidden_dim >= 1, "1 or more")
        self.size = hidden_dim
        self.class_embedding = nn.Embedding(num_classes, hidden_dim)
        nn.init.normal_(self.class_embedding.weight, std=_EMBEDDING_STD)
        self.position = nn.Linear(_POSITION_SIZE, hidden_dim)
        self.vectors = nn.Linear(vector_size, hidden_dim, bias=False) if vector_size else None

    @classmethod
    def from_config(cls, cfg: CfgNode, vector_size: int) -> dict[str, Any]:
        return {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "vector_size": vector_size,
            "hidden_dim": cfg.MODEL.ROI_RELATION_HEAD.CONTEXT.HIDDEN_DIM,
        }

    def embed(self, entities: EntityBatch) -> Tensor:
        """Embed each entity by itself: (R, H) from its vectors, its class and its box."""
        position = box_position(entities.boxes, entities.image_sizes[entities.image])
        embedded = self.class_embedding(entities.classes) + self.position(position)
        if self.vectors is not None:
            embedded = embedded + self.vectors(entities.vectors)
        return embedded

    @abstractmethod
    def forward(self, entities: EntityBatch) -> Tensor:
        """Compute the contextual vectors; called once per batch.

        An entity's vector may depend on the entities of its own image only. :func:`to_rows` and
        :func:`from_rows` bring entities into one row per image and back.

        Args:
            entities: the R entities, image by image; an image may have none.

        Returns:
            (R, H), H being ``self.size``.
        """


def to_rows(values: Tensor, entities: EntityBatch, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Bring the values of entities into one row per image, padded with zeros at the end.

    Each row has at least one place, so that all parameters of a context take part in each step.
    When the model is traced, a batch is one image and each row gets one place more.

    Args:
        values: (R, h), image by image.
        entities: the R entities.
        reverse: put the entities of each image in reverse order.

    Returns:
        (N, L, h), and (R, 2) int64 row and column of each entity, for :func:`from_rows`.
    """
    image = entities.image
    index = torch.arange(image.shape[0], device=image.device)
    if torch.jit.is_tracing():  # the number of entities must not be written into the graph
        ordered, column = (values.flip(0), index.flip(0)) if reverse else (values, index)
        return F.pad(ordered, (0, 0, 0, 1))[None], torch.stack([image, column], dim=1)
    column = index - torch.searchsorted(image, image)  # minus the first entity of the image
    if reverse:
        column = torch.searchsorted(image, image, right=True) - 1 - index
    places = torch.stack([image, column], dim=1)
    shape = (len(entities.sizes), max(1, *entities.sizes), values.shape[1])
    return values.new_zeros(shape).index_put((image, column), values), places


def from_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Return the (R, h) values of entities in (N, L, h) rows; undoes :func:`to_rows`."""
    return rows[places[:, 0], places[:, 1]]


@ENTITY_CONTEXT_REGISTRY.register()
class TransformerContext(EntityContext):
    """Self-attention over the entities of each image, whatever their order."""

    @configurable
    def __init__(self, *, layers: int = 2, heads: int = 4, dropout: float = 0.1, **kwargs: Any):
        """
        Args:
            layers: number of layers.
            heads: number of attention heads, a divisor of H.
            dropout: in training, of attention weights and of each layer's outputs.
            kwargs: see :class:`EntityContext`.

        Raises:
            ValueError: if an option has an invalid value.
        """
        super().__init__(**kwargs)
        _check_layers(layers, dropout)
        fits = heads >= 1 and self.size % heads == 0
        _check("HEADS", heads, fits, f"a divisor of CONTEXT.HIDDEN_DIM, which is {self.size}")
        layer = nn.TransformerEncoderLayer(
            *(self.size, heads, 2 * self.size, dropout), batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(self.size)
        self.encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, vector_size: int) -> dict[str, Any]:
        context = cfg.MODEL.ROI_RELATION_HEAD.CONTEXT
        own = {"layers": context.LAYERS, "heads": context.HEADS, "dropout": context.DROPOUT}
        return {**super().from_config(cfg, vector_size), **own}

    def forward(self, entities: EntityBatch) -> Tensor:
        rows, places = to_rows(self.embed(entities), entities)
        images = torch.arange(rows.shape[0], device=rows.device)
        lengths = (entities.image == images[:, None]).sum(dim=1)
        is_padding = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]
        # The softmax of an image without entities needs one place, or its gradient is NaN.
        is_padding = torch.cat([torch.zeros_like(is_padding[:, :1]), is_padding[:, 1:]], dim=1)
        return from_rows(self.encoder(rows, src_key_padding_mask=is_padding), places)


@ENTITY_CONTEXT_REGISTRY.register()
class LSTMContext(EntityContext):
    """Bidirectional LSTM over the entities of each image, from left to right by box center."""

    @configurable
    def __init__(self, *, layers: int = 2, dropout: float = 0.1, **kwargs: Any):
        """
        Args:
            layers: number of layers, of H / 2 units per direction.
            dropout: in training, of each layer's inputs.
            kwargs: see :class:`EntityContext`.

        Raises:
            ValueError: if an option has an invalid value.
        """
        super().__init__(**kwargs)
        _check_layers(layers, dropout)
        _check("HIDDEN_DIM", self.size, self.size % 2 == 0, "an even number for LSTMContext")
        half = self.size // 2
        self.to_right = nn.ModuleList(
            nn.LSTM(self.size, half, batch_first=True) for _ in range(layers)
        )
        self.to_left = nn.ModuleList(
            nn.LSTM(self.size, half, batch_first=True) for _ in range(layers)
        )
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_config(cls, cfg: CfgNode, vector_size: int) -> dict[str, Any]:
        context = cfg.MODEL.ROI_RELATION_HEAD.CONTEXT
        own = {"layers": context.LAYERS, "dropout": context.DROPOUT}
        return {**super().from_config(cfg, vector_size), **own}

    def forward(self, entities: EntityBatch) -> Tensor:
        by_center = (entities.boxes[:, 0] + entities.boxes[:, 2]).argsort(stable=True)
        order = by_center[entities.image[by_center].argsort(stable=True)]
        values = self.embed(entities)[order]
        for to_right, to_left in zip(self.to_right, self.to_left):
            values, directions = self.dropout(values), []
            # Not every CPU has an LSTM in bfloat16, so autocast leaves it alone.
            # Both directions have the padding at the end, where it changes no entity's state.
            for lstm, reverse in ((to_right, False), (to_left, True)):
                rows, places = to_rows(values, entities, reverse)
                with torch.autocast(rows.device.type, enabled=False):
                    states, _ = lstm(rows.to(lstm.weight_hh_l0.dtype))
                directions.append(from_rows(states, places))
            values = torch.cat(directions, dim=1)
        return torch.zeros_like(values).index_copy(0, order, values)


def build_entity_context(cfg: CfgNode, vector_size: int) -> EntityContext | None:
    """Build the context named by ``MODEL.ROI_RELATION_HEAD.CONTEXT.NAME``; None for "none".

    Args:
        cfg: config.
        vector_size: see :data:`ENTITY_CONTEXT_REGISTRY`.
    """
    key, name = "MODEL.ROI_RELATION_HEAD.CONTEXT.NAME", cfg.MODEL.ROI_RELATION_HEAD.CONTEXT.NAME
    if name == NO_CONTEXT:
        return None
    registry = ENTITY_CONTEXT_REGISTRY
    return build_registered(registry, name, key, EntityContext, cfg, vector_size)


def _check_layers(layers: int, dropout: float) -> None:
    """Check the options that both contexts have."""
    _check("LAYERS", layers, layers >= 1, "1 or more")
    _check("DROPOUT", dropout, 0 <= dropout < 1, "0 to below 1")


def _check(key: str, value: float, is_valid: bool, expected: str) -> None:
    """Raise a ValueError that names the config key of an invalid value."""
    if not is_valid:
        name = f"MODEL.ROI_RELATION_HEAD.CONTEXT.{key}"
        raise ValueError(f"{name} is {value}; expected {expected}.")
