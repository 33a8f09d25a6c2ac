"""``relation_predictions.json``: written record by record, and read so from anyone's file.

The file is a list with one record per image, plain or gzipped::

    {"image_id": same as the data set's,
     "instances": {"boxes": [[x1, y1, x2, y2], ...], "classes": [int, ...], "scores": [float, ...]},
     "relations": {"pairs": [[subject_index, object_index], ...], "predicates": [int, ...],
                   "scores": [float, ...]}}

Boxes are absolute pixels in the frame of the data set's dicts; classes and predicates are
contiguous and 0-based; the scores of relations are triplet scores. The order does not matter, but
equal scores rank as listed. Images may be missing.
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ..structures.scene_graph import SceneGraph
from ..utils.file_io import write_atomically
from .json_stream import list_elements

__all__ = [
    "read_predictions",
    "read_settings",
    "settings_file",
    "write_predictions",
    "write_settings",
]

_EXPECTED = (
    'a list with one record per image: [{"image_id": ..., "instances": ..., "relations": ...}, ...]'
)


def write_predictions(predictions: Iterable[SceneGraph], file: str) -> None:
    """Write the file, whole or not at all."""
    with write_atomically(file) as stream:
        stream.write("[")
        for number, prediction in enumerate(predictions):
            stream.write(",\n" if number else "\n")
            stream.write(json.dumps(prediction.to_dict(), allow_nan=False))
        stream.write("\n]\n")


def read_predictions(
    file: str, num_classes: int | None = None, num_predicates: int | None = None
) -> Iterator[SceneGraph]:
    """Read a plain or gzipped file, holding one record at a time.

    Args:
        file: path.
        num_classes: entity classes of the data set; not checked when None.
        num_predicates: predicates of the data set; not checked when None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such list or is cut off, or a record is wrong; the message names
            the file, the record and the mend.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"No predictions file '{file}'. Evaluating writes relation_predictions.json under "
            "OUTPUT_DIR/inference/TASK."
        )
    for number, record in enumerate(list_elements(file, _EXPECTED)):
        yield _prediction(record, f"{file}, record {number}", num_classes, num_predicates)


def _prediction(
    record: Any, where: str, num_classes: int | None, num_predicates: int | None
) -> SceneGraph:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with image_id, found {record!r:.80}.")
    image_id = record.get("image_id")
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
        raise ValueError(f"{where}: image_id is {image_id!r:.80}; expected the data set's own.")
    where += f" (image {image_id!r})"
    parts = []
    for key, fields in (
        ("instances", ("boxes", "classes", "scores")),
        ("relations", ("pairs", "predicates", "scores")),
    ):
        part = record.get(key)
        if not isinstance(part, dict) or any(name not in part for name in fields):
            found = sorted(part) if isinstance(part, dict) else repr(part)[:40]
            raise ValueError(
                f'{where}: "{key}" is {found}; expected an object with {", ".join(fields)}. '
                "An image without predictions has empty lists, or no record."
            )
        parts.extend(part[name] for name in fields)
    try:
        prediction = SceneGraph.from_arrays(image_id, *parts)
    except ValueError as error:
        message = str(error).removeprefix(f"Prediction of image {image_id!r}: ")
        raise ValueError(f"{where}: {message}") from error
    for name, values, count in (
        ("class", prediction.classes, num_classes),
        ("predicate", prediction.predicates, num_predicates),
    ):
        wrong = values[(values < 0) | (values >= count)] if count is not None else ()
        if len(wrong):
            raise ValueError(
                f"{where}: {name} {wrong[0]} is not one of the data set's {count}, 0 to "
                f"{count - 1}. Classes and predicates are contiguous and 0-based, without "
                '"background" or "no relationship": convert the numbers before writing.'
            )
    return prediction


def settings_file(predictions_file: str) -> str:
    """Where the settings of a predictions file stand: beside it."""
    stem = predictions_file
    for suffix in (".gz", ".json"):
        stem = stem.removesuffix(suffix)
    return f"{stem}_settings.json"


def write_settings(file: str, settings: dict[str, Any]) -> None:
    """Write beside the predictions ``file`` what it was made for, for :func:`read_settings`."""
    with write_atomically(settings_file(file)) as stream:
        json.dump(settings, stream, indent=2)


def read_settings(file: str) -> dict[str, Any]:
    """What a predictions ``file`` was made for; ``{}`` where nobody has written that down.

    Returns:
        ``dataset``, ``task``, ``predicates_per_pair`` (for each k in this list the file holds the
        exact best triplets) and ``triplets`` (how many of them an image; None: all).

    Raises:
        ValueError: the settings cannot be read.
    """
    path = settings_file(file)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as stream:
            settings = json.load(stream)
        return {
            "dataset": settings["dataset"],
            "task": settings["task"],
            "predicates_per_pair": [int(k) for k in settings["predicates_per_pair"]],
            "triplets": None if settings["triplets"] is None else int(settings["triplets"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected dataset, task, predicates_per_pair and triplets ({error!r}). "
            "Remove the file; the predictions are scored without it."
        ) from error
