"""VGG16 as a backbone and as a box head, in Detectron2's registries.

Shapes: N images, R boxes, C channels, H x W pixels or cells, d values per ROI vector.
"""

from collections import OrderedDict

import fvcore.nn.weight_init as weight_init
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.backbone import Backbone

__all__ = ["TORCHVISION_NAMES", "VGG16", "VGG16BoxHead", "build_vgg16_backbone"]

_CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each block
_FACTORS = (1, 2, 4, 8, 8)  # width of each block, in widths of the first


def _torchvision_names() -> dict[str, str]:
    """Map the layer names of torchvision's VGG16 to those of a detector on VGG16."""
    names, index = {}, 0
    for block, count in enumerate(_CONVOLUTIONS, 1):
        for layer in range(1, count + 1):
            names[f"features.{index}"] = f"backbone.conv{block}.conv{block}_{layer}"
            index += 2  # a convolution and its ReLU
        index += 1  # the pooling layer
    names["classifier.0"] = "roi_heads.box_head.fc6"
    names["classifier.3"] = "roi_heads.box_head.fc7"
    return names


TORCHVISION_NAMES = _torchvision_names()
"""Layer names of torchvision's VGG16 checkpoint, and those of a detector here."""


class VGG16(Backbone):
    """The convolutions of VGG16, in five blocks; the last map has stride 16.

    As in Faster R-CNN the pooling after the fifth block is left out.

    Attributes:
        stage_names: ``conv1`` to ``conv5``, or to the last block in ``out_features``; also the
            names of the maps.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        width: int = 64,
        out_features: tuple[str, ...] = ("conv5",),
        freeze_at: int = 0,
    ):
        """
        Args:
            in_channels: channels of the image.
            width: channels of the first block; 64 in VGG16.
            out_features: names of the maps to return.
            freeze_at: number of first blocks that are not trained.
        """
        super().__init__()
        names = [f"conv{block}" for block in range(1, 6)]
        unknown = set(out_features) - set(names)
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.VGG.OUT_FEATURES names {sorted(unknown) or 'nothing'}; VGG16 has {names}."
            )
        self.stage_names: list[str] = names[: max(map(names.index, out_features)) + 1]
        self._out_features = list(out_features)
        self._out_feature_channels, self._out_feature_strides = {}, {}
        blocks = zip(self.stage_names, _CONVOLUTIONS, _FACTORS)
        for block, (name, count, factor) in enumerate(blocks, 1):
            channels = width * factor
            layers = OrderedDict() if block == 1 else OrderedDict(pool=nn.MaxPool2d(2, 2))
            for layer in range(1, count + 1):
                convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
                weight_init.c2_msra_fill(convolution)
                layers[f"{name}_{layer}"] = convolution
                layers[f"relu{block}_{layer}"] = nn.ReLU(inplace=True)
                in_channels = channels
            self.add_module(name, nn.Sequential(layers))
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = 2 ** (block - 1)
            if block <= freeze_at:
                getattr(self, name).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps.

        Args:
            x: (N, C, H, W).

        Returns:
            The maps named in ``out_features``.
        """
        maps = {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                maps[name] = x
        return maps


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG16:
    """Build VGG16 from the keys of ``MODEL.VGG``; ``MODEL.BACKBONE.FREEZE_AT`` counts blocks."""
    return VGG16(
        input_shape.channels,
        width=cfg.MODEL.VGG.WIDTH,
        out_features=tuple(cfg.MODEL.VGG.OUT_FEATURES),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@ROI_BOX_HEAD_REGISTRY.register()
class VGG16BoxHead(nn.Sequential):
    """fc6 and fc7 of VGG16, on (R, C, 7, 7); d is ``MODEL.ROI_BOX_HEAD.FC_DIM``, 4096 in VGG16.

    The dropout after fc6 is off in a detector and on in the relation head, see
    :func:`..relation_head.build.build_visual_parts`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, fc_dim: int = 4096, dropout: float = 0.0):
        """
        Args:
            input_shape: channels, height and width of a pooled ROI.
            fc_dim: d.
            dropout: share of the values after fc6 that are set to 0 in training.
        """
        size = input_shape.channels * (input_shape.height or 1) * (input_shape.width or 1)
        layers = OrderedDict(
            flatten=nn.Flatten(),
            fc6=nn.Linear(size, fc_dim),
            fc6_relu=nn.ReLU(),
            fc6_dropout=nn.Dropout(dropout),
            fc7=nn.Linear(fc_dim, fc_dim),
            fc7_relu=nn.ReLU(),
        )
        super().__init__(layers)
        weight_init.c2_xavier_fill(self.fc6)
        weight_init.c2_xavier_fill(self.fc7)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec):
        return {"input_shape": input_shape, "fc_dim": cfg.MODEL.ROI_BOX_HEAD.FC_DIM}

    @property
    def output_shape(self) -> ShapeSpec:
        """Return the shape of a vector: its d channels."""
        return ShapeSpec(channels=self.fc7.out_features)
