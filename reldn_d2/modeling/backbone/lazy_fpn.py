"""Maps of an FPN that are computed when they are read, the finest one only where it is read.

The finest map takes two thirds of the operations of an FPN, and a quarter of those of
ResNet-50-FPN, but RoIAlign reads it only in small boxes.

Shapes: N images, c channels, h x w cells of a map; M cells that are read.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.modeling.backbone import FPN

__all__ = ["MapsOnDemand", "maps_on_demand"]

# Of the finest map, at least this share is read: then all of it is computed, which needs less
# memory and no gathering of cells.
_DENSE_SHARE = 0.25


def maps_on_demand(backbone: nn.Module, x: Tensor | dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Compute an FPN up to its second finest map; the values are those of ``backbone(x)``.

    Args:
        backbone: any; only Detectron2's FPN without normalization has a finest map on demand.
        x: its input.

    Returns:
        A mapping like that of ``backbone(x)``: a :class:`MapsOnDemand` if it can be one.
    """
    if type(backbone).forward is not FPN.forward or len(backbone.in_features) < 2:
        return backbone(x)
    convolutions = (*backbone.lateral_convs, *backbone.output_convs)
    if backbone._fuse_type != "sum" or any(conv.norm is not None for conv in convolutions):
        return backbone(x)
    return MapsOnDemand(backbone, backbone.bottom_up(x))


class MapsOnDemand(Mapping):
    """Maps of an FPN by name, and rows of single cells of them (:meth:`rows`)."""

    def __init__(self, fpn: FPN, bottom_up: dict[str, Tensor]):
        """
        Args:
            fpn: its lateral and output convolutions have no normalization, and it sums.
            bottom_up: the maps that it starts from.
        """
        self._fpn, self._bottom_up = fpn, bottom_up
        self._maps: dict[str, Tensor] = {}
        self._merged: list[Tensor] = []  # the inputs of the output convolutions, coarsest first
        for index in range(len(fpn.in_features) - 1):
            self._merge(index)
        self._names = list(fpn.output_shape())
        self.pyramid = self._names[: len(fpn.in_features)]  # without maps of a top block
        self.finest = self._names[0]

    def _merge(self, index: int) -> None:
        """Add a lateral map and the upsampled coarser one, as FPN does."""
        features = self._bottom_up[self._fpn.in_features[-index - 1]]
        merged = self._fpn.lateral_convs[index](features)
        if index:
            upsampled = F.interpolate(self._merged[-1], scale_factor=2.0, mode="nearest")
            merged = merged + upsampled
        self._merged.append(merged)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._maps:
            index = len(self._fpn.in_features) - 1 - self._names.index(name)
            if index < 0:
                self._add_top_block()
            else:
                if index == len(self._merged):  # the finest
                    self._merge(index)
                self._maps[name] = self._fpn.output_convs[index](self._merged[index])
        return self._maps[name]

    def _add_top_block(self) -> None:
        source = self._fpn.top_block.in_feature
        source_map = self._bottom_up[source] if source in self._bottom_up else self[source]
        names = self._names[len(self._fpn.in_features) :]
        self._maps.update(zip(names, self._fpn.top_block(source_map)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return N and (h, w) of a map of the pyramid, without computing it."""
        features = self._bottom_up[self._fpn.in_features[self.pyramid.index(name)]]
        return len(features), *features.shape[-2:]

    def rows(self, name: str, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of a map that hold at least the wanted cells.

        Args:
            name: of a map of the pyramid.
            cells: int64 of any shape, indices into the N * h * w cells of the map.

        Returns:
            (M, c) rows, and the row of each of the cells.
        """
        num_images, height, width = self.shape(name)
        if name == self.finest and name not in self._maps:
            is_read = torch.zeros(num_images * height * width, dtype=torch.bool)
            is_read[cells.flatten()] = True
            distinct = is_read.nonzero().squeeze(1)
            if len(distinct) < _DENSE_SHARE * len(is_read):
                row = is_read.cumsum(0) - 1
                return self._finest_rows(distinct, (num_images, height, width)), row[cells]
        return self[name].permute(0, 2, 3, 1).flatten(0, 2), cells

    def _finest_rows(self, cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Compute (M, c) rows of the finest map at distinct cells."""
        (num_images, height, width), index = shape, len(self._merged)
        image, y, x = _coordinates(cells, height, width)
        # The 3 x 3 convolution reads the merged map at these cells and around them. Cells of a
        # frame of one cell around the map, where it reads zeros, have the row after the last.
        padded = height + 2, width + 2
        around = torch.arange(-1, 2)
        rows_of_kernel = (image[:, None] * padded[0] + y[:, None] + 1 + around) * padded[1]
        read = (rows_of_kernel[:, :, None] + x[:, None, None] + 1 + around).flatten(1)  # (M, 9)
        is_read = torch.zeros((num_images, *padded), dtype=torch.bool)
        is_read.view(-1)[read.flatten()] = True
        is_read = is_read[:, 1:-1, 1:-1]
        merged_cells = is_read.flatten().nonzero().squeeze(1)
        slot = torch.full((num_images, *padded), len(merged_cells))
        slot[:, 1:-1, 1:-1][is_read] = torch.arange(len(merged_cells))

        merged = self._merged_rows(index, merged_cells, height, width)
        merged = torch.cat([merged, merged.new_zeros(1, merged.shape[1])])
        patches = merged.index_select(0, slot.view(-1)[read].flatten())
        patches = patches.view(len(cells), 9 * merged.shape[1])
        convolution = self._fpn.output_convs[index]
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, convolution.bias)

    def _merged_rows(self, index: int, cells: Tensor, height: int, width: int) -> Tensor:
        """Compute rows of the lateral map plus the upsampled coarser one at distinct cells."""
        image, y, x = _coordinates(cells, height, width)
        lateral = self._fpn.lateral_convs[index]
        features = self._bottom_up[self._fpn.in_features[-index - 1]].permute(0, 2, 3, 1)
        rows = F.linear(features[image, y, x], lateral.weight.flatten(1), lateral.bias)
        return rows + self._merged[-1].permute(0, 2, 3, 1)[image, y // 2, x // 2]


def _coordinates(cells: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, row and column of the cells of maps."""
    row = torch.div(cells, width, rounding_mode="floor")
    return torch.div(row, height, rounding_mode="floor"), row % height, cells % width
