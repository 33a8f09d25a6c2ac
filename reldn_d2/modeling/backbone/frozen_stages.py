"""Computing the stages once that are frozen and equal in the detector and the predicate backbone.

With ``MODEL.BACKBONE.FREEZE_AT: 2`` neither the detector nor the predicate backbone trains its stem
and ``res2``, and both have the detector's weights. The predicate backbone then continues from the
detector's maps, which are the very values that it would compute.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import ResNet

from .predicate_backbone import share_first_stages
from .vgg import VGG16

__all__ = ["FrozenStages"]

# Their first stages are called one after the other, each on the output of the one before.
_BODIES = (ResNet.forward, VGG16.forward)
_DIFFERS_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)

_Stage = tuple[str, nn.ModuleList, nn.ModuleList]  # its name, and both sides' modules


class FrozenStages:
    """Finds the equal frozen first stages of two backbones, and the backbone that continues there.

    Weights are compared before the first use and again whenever the frozen stages have changed:
    which ones there are, their modules, or a weight, such as by loading a checkpoint. Torch does
    not say when a weight is changed in place through its ``.data``, so that goes unnoticed.
    """

    def __init__(self) -> None:
        self._compared: tuple[list[Any] | None, str | None] = None, None

    def later_backbone(self, detector: nn.Module, predicate: nn.Module) -> nn.Module | None:
        """Return the predicate backbone without the stages that the detector computes as well.

        Args:
            detector, predicate: the backbones.

        Returns:
            a backbone with ``shared_stages``, whose input is a dict of the detector's maps of these
            names, see :func:`.predicate_backbone.share_first_stages`; it has the same modules as
            the predicate backbone. None if no stage is frozen and equal.
        """
        stages = _frozen_stages(detector, predicate)
        seen = _versions(stages)
        if seen is None:
            return None
        compared, last = self._compared
        if seen != compared:
            last = _last_equal(stages)
            self._compared = seen, last
        if last is None:
            return None
        twin = copy.copy(predicate)  # so that the predicate backbone keeps its stages
        twin._modules = dict(twin._modules)
        return share_first_stages(twin, last)


def _frozen_stages(*backbones: nn.Module) -> list[_Stage]:
    """Return the first stages that neither side trains, of backbones that could share them.

    The stem belongs to the first stage.
    """
    theirs, ours = bodies = [getattr(x, "bottom_up", x) for x in backbones]
    backbone = backbones[1]
    if type(theirs) is not type(ours) or type(ours).forward not in _BODIES:
        return []
    if backbone is not ours and type(backbone).forward is not FPN.forward:
        return []
    stages: list[_Stage] = []
    before: tuple[str, ...] = ("stem",) if hasattr(ours, "stem") else ()
    names = list(ours.stage_names)
    for name in names if backbone is not ours else names[:-1]:  # one stage must be left
        if not hasattr(theirs, name):
            break
        parts = [nn.ModuleList(getattr(body, x) for x in (*before, name)) for body in bodies]
        if not all(map(_is_fixed, parts)):
            break
        stages.append((name, *parts))
        before = ()
    return stages


def _is_fixed(stage: nn.Module) -> bool:
    """Tell whether training leaves alone what a stage computes."""
    if any(x.requires_grad for x in stage.parameters()):
        return False
    return not any(isinstance(x, _DIFFERS_IN_TRAINING) for x in stage.modules())


def _versions(stages: list[_Stage]) -> list[Any] | None:
    """Return what changes with a module or weight of the stages; None if torch does not say.

    It reads no values, so that a GPU is not waited for in each step.
    """
    seen: list[Any] = []
    for _, *sides in stages:
        for side in sides:
            seen += [x for x in side.modules() if x is not side]  # compared by identity
            for x in (*side.parameters(), *side.buffers()):
                if x.is_inference():
                    return None
                seen.append((x.data_ptr(), x._version))
    return seen


def _last_equal(stages: list[_Stage]) -> str | None:
    """Return the name of the last stage up to which both sides are equal; None if none is."""
    last = None
    for name, theirs, ours in stages:
        if not _are_equal(theirs, ours):
            break
        last = name
    return last


def _are_equal(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two stages always compute the same from the same input."""
    first_state: dict[str, Tensor] = first.state_dict()
    second_state = second.state_dict()
    return (
        repr(first) == repr(second)
        and first_state.keys() == second_state.keys()
        and all(
            x.dtype == second_state[name].dtype and torch.equal(x, second_state[name])
            for name, x in first_state.items()
        )
    )
