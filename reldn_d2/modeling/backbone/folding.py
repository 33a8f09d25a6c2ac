"""Convolutions that apply their frozen normalization through their own weights, in training.

A ``FrozenBatchNorm2d`` after a convolution scales and shifts its output, channel by channel. A
convolution with scaled weights and another bias does the same without a pass over the output. In
the trained stages it saves one in the backward pass as well.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import Conv2d, FrozenBatchNorm2d

__all__ = ["FoldingConv2d", "prepare_folding", "set_folding"]


class FoldingConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a ``FrozenBatchNorm2d``, which it folds while ``folds`` is True.

    Its output then differs by rounding. Otherwise, in particular at test time, it is Detectron2's.
    """

    folds: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.folds or self.norm is None:
            return super().forward(x)
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def prepare_folding(module: nn.Module) -> None:
    """Make the convolutions of a module able to fold; subclasses of Detectron2's stay as they are.

    Weights and their names stay the same.
    """
    for part in module.modules():
        if type(part) is Conv2d and type(part.norm) is FrozenBatchNorm2d:
            part.__class__ = FoldingConv2d


def set_folding(module: nn.Module, folds: bool) -> None:
    """Switch folding on or off in all convolutions that can fold."""
    for part in module.modules():
        if isinstance(part, FoldingConv2d):
            part.folds = folds
