"""Registration in Detectron2's catalogs. Names are read from the files on first access."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ...structures.name_matching import NAME_FIELDS, require_unique_names
from ...utils.registry import did_you_mean

__all__ = [
    "DATASET_ERRORS",
    "UnknownDatasetError",
    "dataset_names",
    "joint_names",
    "register_dataset",
    "require_dataset",
]

# Everything that finding and loading a dataset raises on purpose; str(error) explains the fix.
# ImportError: h5py is not installed.
DATASET_ERRORS = (ImportError, OSError, ValueError)

_READ_ON_DEMAND = (
    "thing_classes",
    "predicate_classes",
    "attribute_classes",
    "thing_dataset_id_to_contiguous_id",
)
_name_readers: dict[str, Callable[[], dict[str, Any]]] = {}


class UnknownDatasetError(ValueError):
    """No dataset of this name is registered."""


class _MetadataFromFiles(Metadata):
    """Detectron2's ``Metadata`` that reads missing names from the dataset's files."""

    def __getattr__(self, key: str) -> Any:
        # Attributes of its own would appear in as_dict(), so the reader is kept elsewhere.
        if key in _READ_ON_DEMAND and self.name in _name_readers:
            try:
                names = _name_readers[self.name]()
            except FileNotFoundError as error:  # not downloaded yet: as if the key were not set
                raise AttributeError(f"{key} of dataset '{self.name}': {error}") from error
            _require_unique(names, self.name)
            for name, value in names.items():
                self.__dict__.setdefault(name, value)
            if key in self.__dict__:
                return self.__dict__[key]
        return super().__getattr__(key)


def register_dataset(
    name: str,
    load: Callable[..., list[dict[str, Any]]],
    arguments: dict[str, Any],
    *,
    annotation_files: Sequence[str],
    read_names: Callable[[], dict[str, Any]] | None = None,
    **metadata: Any,
) -> None:
    """Register a dataset. No file is read before its first use.

    Args:
        name: name of the dataset.
        load: returns the dataset dicts.
        arguments: keyword arguments of ``load``.
        annotation_files: the files that the annotations depend on; statistics are recounted when
            the content of one of them changes.
        read_names: returns ``thing_classes``, ``predicate_classes``, ... on first access; None if
            they are in ``metadata``.
        metadata: further metadata.

    Raises:
        ValueError: two classes or two predicates have the same name; with ``read_names``, on first
            access.
    """
    _require_unique(metadata, name)
    DatasetCatalog.register(name, lambda: load(**arguments))
    if read_names is not None:
        before = MetadataCatalog.pop(name).as_dict() if name in MetadataCatalog else {}
        _name_readers[name] = read_names
        MetadataCatalog[name] = _MetadataFromFiles(**{**before, "name": name})
    options = dict(sorted(arguments.items()))
    MetadataCatalog.get(name).set(
        annotation_files=list(annotation_files),
        loader=f"{load.__module__}.{load.__qualname__}({options})",
        **metadata,
    )


def _require_unique(metadata: Mapping[str, Any], name: str) -> None:
    """Raise if the dataset ``name`` lists a class or predicate twice."""
    for field in NAME_FIELDS:
        require_unique_names(metadata.get(field) or (), field, f"dataset '{name}'")


def dataset_names(name: str) -> dict[str, list[str]]:
    """Return the class and predicate names of a registered dataset, by metadata field.

    Fields that its metadata lacks are missing.

    Raises:
        ValueError: two classes or two predicates have the same name.
    """
    metadata = MetadataCatalog.get(name)
    names = {field: metadata.get(field, None) for field in NAME_FIELDS}
    _require_unique(names, name)
    return {field: list(values) for field, values in names.items() if values is not None}


def joint_names(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names that datasets which are trained on together have, by metadata field.

    The names of each field, and their order, are those of the first dataset that lists any; the
    datasets after it may list them in another order, and those without attributes list none.
    """
    joint: dict[str, list[str]] = {}
    for name in names:
        for field, values in dataset_names(name).items():
            if values:
                joint.setdefault(field, values)
    return joint


def require_dataset(name: str) -> None:
    """Raise if no dataset of this name is registered.

    Raises:
        UnknownDatasetError: no such dataset; the message suggests similar names.
    """
    registered = DatasetCatalog.list()
    if name not in registered:
        raise UnknownDatasetError(
            f"No dataset '{name}' is registered.{did_you_mean(name, registered)} Pass --module to "
            "import the module that registers your own dataset (docs/extending.md)."
        )
