"""Computing the stages once that are frozen and equal in the detector and the predicate backbone.

With ``MODEL.BACKBONE.FREEZE_AT: 2`` neither the detector nor the predicate backbone trains its stem
and ``res2``, and both have the detector's weights. The predicate backbone then continues from the
detector's maps, which are the very values that it would compute.
"""

import copy

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


class FrozenStages:
    """Finds the equal frozen first stages of two backbones, and the backbone that continues there.

    Weights are compared before the first use and again whenever one may have been changed, such as
    by loading a checkpoint.
    """

    def __init__(self, detector_backbone: nn.Module, predicate_backbone: nn.Module):
        self._backbones = detector_backbone, predicate_backbone
        self._bodies = tuple(getattr(x, "bottom_up", x) for x in self._backbones)
        self._candidates = self._find_candidates()
        self._compared: list[tuple[int, int]] | None = None
        self._later: nn.Module | None = None

    def _find_candidates(self) -> list[tuple[str, list[nn.Module], list[nn.Module]]]:
        """Return the name of each first stage that might be shared, and both sides' modules.

        The stem belongs to the first stage.
        """
        theirs, ours = self._bodies
        if type(theirs) is not type(ours) or type(ours).forward not in _BODIES:
            return []
        backbone = self._backbones[1]
        if backbone is not ours and type(backbone).forward is not FPN.forward:
            return []
        candidates = []
        before: tuple[str, ...] = ("stem",) if hasattr(ours, "stem") else ()
        names = list(ours.stage_names)
        for name in names if backbone is not ours else names[:-1]:  # one stage must be left
            if not hasattr(theirs, name):
                break
            parts = [[getattr(body, x) for x in (*before, name)] for body in self._bodies]
            if "".join(map(repr, parts[0])) != "".join(map(repr, parts[1])):
                break
            candidates.append((name, *parts))
            before = ()
        return candidates

    def later_backbone(self) -> nn.Module | None:
        """Return the predicate backbone without the stages that the detector computes as well.

        Returns:
            a backbone with ``shared_stages``, whose input is a dict of the detector's maps of these
            names, see :func:`.predicate_backbone.share_first_stages`; it has the same modules as
            the predicate backbone. None if no stage is frozen and equal.
        """
        seen = self._versions()
        if seen is None or seen != self._compared:
            self._compared = seen
            last = None
            for name, theirs, ours in self._candidates:
                if not all(map(_are_equal_and_frozen, theirs, ours)):
                    break
                last = name
            self._later = None
            if last is not None and seen is not None:
                twin = copy.copy(self._backbones[1])
                twin._modules = dict(twin._modules)
                self._later = share_first_stages(twin, last)
        return self._later

    def _versions(self) -> list[tuple[int, int]] | None:
        """Return what changes when a weight is changed or replaced; None if torch does not say."""
        versions = []
        for _, *sides in self._candidates:
            for stage in (x for side in sides for x in side):
                for x in (*stage.parameters(), *stage.buffers()):
                    if x.is_inference():
                        return None
                    versions.append((x.data_ptr(), 2 * x._version + x.requires_grad))
        return versions


def _are_equal_and_frozen(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two stages always compute the same from the same input."""
    for stage in (first, second):
        if any(x.requires_grad for x in stage.parameters()):
            return False
        if any(isinstance(x, _DIFFERS_IN_TRAINING) for x in stage.modules()):
            return False
    first_state: dict[str, Tensor] = first.state_dict()
    second_state = second.state_dict()
    return first_state.keys() == second_state.keys() and all(
        x.dtype == second_state[name].dtype and torch.equal(x, second_state[name])
        for name, x in first_state.items()
    )
