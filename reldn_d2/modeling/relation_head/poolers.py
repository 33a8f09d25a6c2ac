"""RoIAlign over the levels of a pyramid.

Shapes: N images, R boxes of the batch, c channels, h x w cells of a map, G x G cells of a pooled
box, S x S samples of each; M rows of cells. Boxes are XYXY in pixels of the network's input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes

from ..backbone.lazy_fpn import MapsOnDemand
from ..precision import at_least_float32

__all__ = ["LevelPooler"]


class LevelPooler(ROIPooler):
    """Detectron2's ``ROIPooler`` with fewer transfers to the host, and for maps on demand.

    Detectron2 finds the boxes of each level separately, which makes the host wait for the device
    once per level. Here the boxes are sorted by level, and it waits once. Detectron2 also rounds
    boxes to the type of the maps; here maps in half precision are pooled in float32.
    """

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool as ``ROIPooler`` does, with the same values: (R, c, G, G) of at least float32.

        Args:
            x: (N, c, h, w) maps, finest first.
            box_lists: of each image.
        """
        x = at_least_float32(x)
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if traced or len(x) == 1 or not box_lists:
            return super().forward(x, box_lists)
        levels = self._levels(box_lists)
        order = levels.argsort(stable=True)
        counts = (levels[:, None] == torch.arange(len(x), device=levels.device)).sum(0).tolist()
        boxes = _with_image(box_lists)[order].split(counts)
        pooled = torch.cat([pool(*part) for pool, *part in zip(self.level_poolers, x, boxes)])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return pooled.index_select(0, place)

    def _levels(self, box_lists: list[Boxes]) -> Tensor:
        return assign_boxes_to_levels(
            *(box_lists, self.min_level, self.max_level),
            *(self.canonical_box_size, self.canonical_level),
        )

    def pool(self, maps: Any, names: list[str], box_lists: list[Boxes]) -> Tensor:
        """Pool from the named maps of a mapping: (R, c, G, G).

        :class:`..backbone.lazy_fpn.MapsOnDemand` are pooled by rows of their cells, which
        gives the same values up to rounding, unless some are of the FPN's top block.
        """
        if isinstance(maps, MapsOnDemand) and self._has_fixed_samples():
            if set(names) <= set(maps.pyramid):
                return self._pool_rows(maps, names, box_lists)
        return self([maps[name] for name in names], box_lists)

    def _has_fixed_samples(self) -> bool:
        return all(isinstance(x, ROIAlign) and x.sampling_ratio > 0 for x in self.level_poolers)

    def _pool_rows(self, maps: MapsOnDemand, names: list[str], box_lists: list[Boxes]) -> Tensor:
        boxes, levels = _with_image(box_lists), self._levels(box_lists)
        tables, rows, weights, members = [], [], [], []
        start = 0
        for level, (name, pooler) in enumerate(zip(names, self.level_poolers)):
            member = (levels == level).nonzero().squeeze(1)
            cells, weight = _sampled_cells(boxes[member], maps.shape(name), pooler)
            table, row = maps.rows(name, cells)
            tables.append(table)
            rows.append(row + start)
            weights.append(weight)
            members.append(member)
            start += len(table)
        place = torch.cat(members).argsort()
        table = torch.cat(tables).float()
        row, weight = torch.cat(rows)[place], torch.cat(weights)[place]  # (R, G, G, 4 * S * S)
        pooled = _WeightedRows.apply(table, row.flatten(0, 2), weight.flatten(0, 2))
        return pooled.view(*row.shape[:3], table.shape[1]).permute(0, 3, 1, 2)


def _with_image(box_lists: list[Boxes]) -> Tensor:
    """Return (R, 5), the index of the image before each box."""
    parts = []
    for index, boxes in enumerate(box_lists):
        image = boxes.tensor.new_full((len(boxes), 1), index)
        parts.append(torch.cat([image, boxes.tensor], dim=1))
    return torch.cat(parts)


def _sampled_cells(
    boxes: Tensor, shape: tuple[int, int, int], pooler: ROIAlign
) -> tuple[Tensor, Tensor]:
    """Find the cells that RoIAlign reads of a map, and their weights.

    A sample is interpolated between four cells, and a cell of the result is the mean of S x S
    samples, so it is a weighted sum of 4 * S * S cells of the map.

    Args:
        boxes: (R, 5).
        shape: N, h and w of the map.
        pooler: S is its ``sampling_ratio``.

    Returns:
        (R, G, G, 4 * S * S) int64, indices into the N * h * w cells; float32 of the same shape.
    """
    _, height, width = shape
    offset = 0.5 if pooler.aligned else 0.0
    corners = boxes[:, 1:] * pooler.spatial_scale - offset
    sides = corners[:, 2:] - corners[:, :2]
    if not pooler.aligned:
        sides = sides.clamp(min=1.0)
    axes = []
    for axis, limit in ((1, height), (0, width)):
        cells_of_axis = pooler.output_size[1 - axis]
        step = sides[:, axis, None] / cells_of_axis
        num_samples = cells_of_axis * pooler.sampling_ratio
        # Positions of the samples of all cells along this axis: (R, G * S).
        at = torch.arange(num_samples, device=boxes.device)
        cell = torch.div(at, pooler.sampling_ratio, rounding_mode="floor")
        within = (at % pooler.sampling_ratio + 0.5) / pooler.sampling_ratio
        position = corners[:, axis, None] + (cell + within) * step
        outside = (position < -1.0) | (position > limit)
        position = position.clamp(min=0, max=limit - 1)
        low = position.floor()
        share = position - low
        low = low.long()
        index = torch.stack([low, (low + 1).clamp(max=limit - 1)], dim=-1)
        weight = torch.stack([1 - share, share], dim=-1).masked_fill(outside[..., None], 0.0)
        weight = weight / pooler.sampling_ratio
        axes += [
            x.view(len(boxes), cells_of_axis, 2 * pooler.sampling_ratio) for x in (index, weight)
        ]
    row, row_weight, column, column_weight = axes  # (R, G, 2 * S)
    first = boxes[:, 0].long() * height * width
    cells = (row * width + first[:, None, None])[:, :, None, :, None] + column[:, None, :, None, :]
    weights = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
    return cells.flatten(3), weights.flatten(3)


class _WeightedRows(torch.autograd.Function):
    """Sum weighted rows of a table: ``(weight[:, :, None] * table[row]).sum(1)``.

    Args of ``apply``: (M, c) float32 table; (Q, T) int64 rows; (Q, T) weights without a gradient.
    Returns (Q, c).
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(row, weight)
        ctx.num_rows = len(table)
        return F.embedding_bag(row, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # The other way round each row of the table sums the results that have read it: sort the
        # reads by their row.
        row, weight = ctx.saved_tensors
        sorted_row, order = row.flatten().sort()
        result = torch.div(order, row.shape[1], rounding_mode="floor")
        first = torch.searchsorted(sorted_row, torch.arange(ctx.num_rows))
        of_table = F.embedding_bag(
            result,
            gradient.contiguous(),
            first,
            mode="sum",
            per_sample_weights=weight.flatten()[order],
        )
        return of_table, None, None
