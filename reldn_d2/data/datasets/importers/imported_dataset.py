"""The formats that can be imported, and their registration without an import."""

from collections.abc import Callable, Sequence
from typing import Any

from ....structures.name_matching import NAME_FIELDS
from ..catalog import register_dataset
from ..coco import locate_nested_images
from ..io import no_garbage_collection
from .label_studio import read_label_studio
from .psg import SPLITS, read_psg
from .raw_visual_genome import read_raw_visual_genome
from .relation_csv import read_relation_csv
from .relation_import import Imported, ImportOptions
from .sgg_benchmark import read_sgg_benchmark

__all__ = ["FORMATS", "import_relations", "register_imported_relations"]

FORMATS: dict[str, Callable[[str, ImportOptions], Imported]] = {
    "csv": read_relation_csv,
    "label-studio": read_label_studio,
    "visual-genome": read_raw_visual_genome,
    "sgg-benchmark": read_sgg_benchmark,
    "psg": read_psg,
}


def import_relations(file_format: str, path: str, options: ImportOptions | None = None) -> Imported:
    """Read a file in another format.

    Args:
        file_format: one of :data:`FORMATS`.
        path: the file.
        options: see :class:`ImportOptions`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format, an option of another format, or an invalid file; the message
            names the file and its first invalid record, and ``error.problems`` all of them.
    """
    options = options or ImportOptions()
    if file_format not in FORMATS:
        raise ValueError(f"Unknown format {file_format!r}; expected one of {', '.join(FORMATS)}.")
    for name, value, owner in (
        ("image_data", options.image_data, "visual-genome"),
        ("split", options.split, "psg"),
        ("panoptic_root", options.panoptic_root, "psg"),
        ("attributes", options.attributes, "visual-genome and sgg-benchmark"),
    ):
        if value is not None and file_format not in owner.split(" and "):
            raise ValueError(f"{name} is an option of {owner} files, not of {file_format} files.")
    if options.split not in (None, *SPLITS):
        raise ValueError(f"Unknown split {options.split!r}; expected one of {', '.join(SPLITS)}.")
    with no_garbage_collection():
        return FORMATS[file_format](path, options)


def register_imported_relations(
    name: str,
    metadata: dict[str, Any],
    file_format: str,
    path: str,
    image_root: str,
    **options: Any,
) -> None:
    """Register a file in another format, which is then read as it is at each use.

    Args:
        name: name of the dataset.
        metadata: further metadata; may be empty. ``evaluator_type`` defaults to "relation".
        file_format: one of :data:`FORMATS`.
        path: the file.
        image_root: folder that the file names of images are relative to.
        options: further attributes of :class:`ImportOptions`, such as ``split``.
    """
    settings = ImportOptions(image_root=image_root, **options)

    def read_names() -> dict[str, Sequence[str]]:
        _, *names = import_relations(file_format, path, settings)
        return dict(zip(NAME_FIELDS, names))

    register_dataset(
        name,
        load_imported_relations,
        dict(file_format=file_format, path=path, options=settings),
        annotation_files=[path, *filter(None, [settings.image_data])],
        read_names=read_names,
        load_annotations=lambda: import_relations(file_format, path, settings).dicts,
        image_root=image_root,
        **{"evaluator_type": "relation", **metadata},
    )


def load_imported_relations(
    file_format: str, path: str, options: ImportOptions
) -> list[dict[str, Any]]:
    """Load a file in another format as Detectron2 dataset dicts, whose images must exist.

    Raises:
        FileNotFoundError: the file, the folder or an image is missing.
        ValueError: see :func:`import_relations`.
    """
    dicts = import_relations(file_format, path, options).dicts
    paths = locate_nested_images(options.image_root, [record["file_name"] for record in dicts])
    for record, file_name in zip(dicts, paths, strict=True):
        record["file_name"] = file_name
    return dicts
