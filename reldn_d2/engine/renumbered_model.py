"""Run a model on a dataset that lists the model's classes or predicates in another order."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.datasets.catalog import joint_names
from ..structures.name_matching import Renumbering

__all__ = ["RenumberedModel", "dataset_renumbering", "in_order_of"]

_HINT = "Use a dataset with the names that the model was trained on."


class RenumberedModel(nn.Module):
    """A model whose inputs and outputs have the ids of a dataset instead of its own.

    Ground truth and detections among the inputs are mapped too, because the tasks SGCLS and PRDCLS
    and detectors that read files give them to the model.
    """

    def __init__(self, model: nn.Module, renumbering: Renumbering):
        """
        Args:
            model: maps a list of dicts to a list of dicts.
            renumbering: maps ids of the dataset to those of the model.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        self._to_model, self._to_dataset = renumbering, renumbering.inverse()

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predict; keys and frames are those of the model."""
        outputs = self.model([self._to_model.fields(x) for x in batched_inputs])
        return [self._to_dataset.fields(x) for x in outputs]


def dataset_renumbering(model: nn.Module, *datasets: str) -> Renumbering:
    """Match the names of datasets with those of a model, which its checkpointer sets.

    Args:
        model: possibly wrapped for distributed training; names that it lacks are not compared.
        datasets: a registered dataset; or several that are trained on together, which have the
            names of :func:`..data.datasets.catalog.joint_names`.

    Returns:
        the mapping from ids of the datasets to those of the model.

    Raises:
        NameMismatchError: if the names differ by more than their order.
    """
    names = getattr(getattr(model, "module", model), "names", {})
    owner = f"dataset{'s' * (len(datasets) > 1)} '{', '.join(datasets)}'"
    return Renumbering.between(joint_names(datasets), names, owner, "the model", hint=_HINT)


def in_order_of(dataset_name: str, model: nn.Module) -> nn.Module:
    """Return the model, wrapped if the dataset lists its names in another order."""
    renumbering = dataset_renumbering(model, dataset_name)
    return RenumberedModel(model, renumbering) if renumbering else model
