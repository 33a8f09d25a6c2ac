"""Write and read ``relation_predictions.json``, the model's own or anyone's.

The file is a JSON list with one record per image, plain or gzipped::

    {"image_id": same as in the dataset,
     "instances": {"boxes": [[x1, y1, x2, y2], ...], "classes": [int, ...], "scores": [float, ...]},
     "relations": {"pairs": [[subject_index, object_index], ...], "predicates": [int, ...],
                   "scores": [float, ...]}}

"instances" may also have "attributes" and "attribute_scores": for each box the list of its
attributes and the list of their scores. "relations" may also have "predicate_scores", the
probabilities of the predicates, which graphs show and no metric reads.

Boxes are absolute pixels in the frame of the dataset's dicts; classes and predicates are
contiguous and 0-based; the scores of relations are triplet scores. The order does not matter, but
equal scores rank as listed. Images may be missing. A file with one record per line, as
:func:`write_predictions` writes it, or in JSON Lines without the brackets, is read record by
record; any other list is read into memory.
"""

import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from ..structures.attributes import EntityAttributes
from ..structures.name_matching import NAME_FIELDS
from ..structures.scene_graph import SceneGraph
from ..utils.file_io import json_problem, write_atomically

__all__ = [
    "PREDICTIONS_FILE",
    "read_predictions",
    "read_settings",
    "settings_file",
    "write_predictions",
    "write_settings",
]

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "relation_predictions.json"

_EXPECTED = (
    'a list with one record per image: [{"image_id": ..., "instances": ..., "relations": ...}, ...]'
)
_GZIP_BEGIN = b"\x1f\x8b"
_PICKLE_SUFFIXES = (".pkl", ".pickle", ".pytorch", ".pth", ".pt")
# Protocols 2 to 5 of pickle, and the ZIP archive that torch.save writes.
_PICKLE_BEGINS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 9  # -Infinity; a file that is cut off within a token has an error at its start


def write_predictions(predictions: Iterable[SceneGraph], file: str) -> None:
    """Write a predictions file atomically."""
    with write_atomically(file) as stream:
        stream.write("[")
        for index, prediction in enumerate(predictions):
            stream.write(",\n" if index else "\n")
            stream.write(json.dumps(prediction.to_dict(), allow_nan=False))
        stream.write("\n]\n")


def read_predictions(
    file: str,
    num_classes: int | None = None,
    num_predicates: int | None = None,
    num_attributes: int | None = None,
) -> Iterator[SceneGraph]:
    """Read a plain or gzipped predictions file.

    Args:
        file: path; its content says whether it is gzipped.
        num_classes: entity classes of the dataset; not checked when None.
        num_predicates: predicates of the dataset; not checked when None.
        num_attributes: attributes of the dataset; not checked when None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such list or is cut off, or a record is wrong; the message names
            the file and the record and says how to fix it.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"No predictions file '{file}'. An evaluation writes {PREDICTIONS_FILE} to "
            "OUTPUT_DIR/inference/TASK."
        )
    with open(file, "rb") as raw:
        begin = raw.read(4)
    if file.lower().endswith(_PICKLE_SUFFIXES) or begin.startswith(_PICKLE_BEGINS):
        raise ValueError(
            f"{file}: is a pickle of another program (Python's pickle or torch.save), which is not "
            "read here. tools/import_predictions.py converts those of Scene-Graph-Benchmark, "
            f"Neural Motifs and RelDN's authors to {PREDICTIONS_FILE}. Convert others there; "
            f"docs/evaluation.md describes the format: expected {_EXPECTED}, in UTF-8 or gzipped."
        )
    is_gzipped = begin.startswith(_GZIP_BEGIN)
    index = 0
    try:
        with (gzip.open if is_gzipped else open)(file, "rt", encoding="utf-8-sig") as stream:
            for record in _records(file, stream):
                yield _prediction(
                    record,
                    f"{file}, record {index}",
                    ("class", num_classes),
                    ("predicate", num_predicates),
                    ("attribute", num_attributes),
                )
                index += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{_cut_off(file, index)} ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected {_EXPECTED}, in UTF-8 or gzipped: {error}.") from error


def _records(file: str, stream: IO[str]) -> Iterator[Any]:
    """Yield the records of a list or of JSON Lines, line by line as long as each line is one."""
    first = next((line for line in stream if line.strip()), "").lstrip()
    if not first:
        raise ValueError(f"{file}: is empty; expected {_EXPECTED}. Copy or write it again.")
    is_list = first[0] == "["
    index, rest = 0, ""
    for line in itertools.chain([first[1:] if is_list else first], stream):
        if not line.strip():
            continue
        text = line.strip()
        try:
            record = json.loads(text.removesuffix(",") if is_list else text)
        except (RecursionError, ValueError) as error:
            if is_list:
                rest = line
                break
            if index == 0:
                begin = f"{file}: begins with {first[:20]!r}; expected {_EXPECTED}."
                raise ValueError(begin) from error
            raise ValueError(_unreadable(file, index, error)) from error
        if is_list and not text.endswith(","):
            rest = line
            break
        yield record
        index += 1
    if is_list:  # the last record and the closing bracket, or a list in another layout
        yield from _rest_of_list(file, rest + stream.read(), index)


def _rest_of_list(file: str, text: str, index: int) -> Iterator[Any]:
    """Yield the records in the text from record ``index`` on to the closing bracket."""
    decoder = json.JSONDecoder()
    position = _SPACE.match(text).end()
    is_open = index > 0 or text[position : position + 1] != "]"
    while is_open:
        try:
            record, end = decoder.raw_decode(text, position)
        except (RecursionError, ValueError) as error:
            raise ValueError(_unreadable(file, index, error)) from error
        yield record
        index += 1
        position = _SPACE.match(text, end).end()
        separator = text[position : position + 1]
        if not separator:
            raise ValueError(_cut_off(file, index))
        if separator not in ",]":
            raise ValueError(
                f"{file}: {text[position : position + 20]!r} after record {index - 1}; expected a "
                "comma or the closing bracket. Fix the file there."
            )
        is_open = separator == ","
        if is_open:
            position = _SPACE.match(text, position + 1).end()
    position = _SPACE.match(text, position + 1).end()
    if position < len(text):
        raise ValueError(
            f"{file}: {text[position : position + 20]!r} after the closing bracket; expected "
            f"{_EXPECTED}. Merge several lists into one."
        )


def _cut_off(file: str, index: int) -> str:
    return (
        f"{file}: ends within record {index}, or before the closing bracket: it is cut off. Copy "
        "or write it again."
    )


def _unreadable(file: str, index: int, error: Exception) -> str:
    """Return the message about a record that is no JSON, or whose end is missing."""
    if not isinstance(error, json.JSONDecodeError):  # nested too deeply, too many digits
        return (
            f"{file}: record {index} cannot be read: {json_problem(error)}. Expected {_EXPECTED}; "
            "write the file again."
        )
    text = error.doc.rstrip()
    # The position of an unterminated string is its beginning, however long it is.
    if error.msg.startswith("Unterminated string") or error.pos >= len(text):
        return _cut_off(file, index)
    if error.pos >= len(text) - _LONGEST_TOKEN and not text.endswith("]"):
        return _cut_off(file, index)
    around = error.doc[max(error.pos - 20, 0) : error.pos + 20]
    return (
        f"{file}: record {index} is no JSON: {error.msg}, near {around!r}. Fix it, or write the "
        "file again with a JSON library."
    )


def _prediction(record: Any, where: str, *counts: tuple[str, int | None]) -> SceneGraph:
    """Check and return a record; ``counts`` has the names and counts of the three kinds of ids."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with image_id, found {record!r:.80}.")
    image_id = record.get("image_id")
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
        raise ValueError(f"{where}: image_id is {image_id!r:.80}; expected the dataset's own.")
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
        attributes = _attributes(record["instances"], f"Prediction of image {image_id!r}")
        probabilities = record["relations"].get("predicate_scores")
        prediction = SceneGraph.from_arrays(image_id, *parts, probabilities, attributes=attributes)
    except ValueError as error:
        message = str(error).removeprefix(f"Prediction of image {image_id!r}: ")
        raise ValueError(f"{where}: {message}") from error
    attribute_ids = () if attributes is None else attributes.ids
    ids = (prediction.classes, prediction.predicates, attribute_ids)
    for (name, count), values in zip(counts, map(np.asarray, ids), strict=True):
        wrong = values[(values < 0) | (values >= count)] if count is not None else ()
        if len(wrong):
            raise ValueError(
                f"{where}: {name} {wrong[0]} is not one of the dataset's {count}, 0 to "
                f'{count - 1}. Ids are contiguous and 0-based, without "background" or "no '
                'relationship": convert the ids before writing.'
            )
    return prediction


def _attributes(instances: dict[str, Any], where: str) -> EntityAttributes | None:
    """Return the attributes of a record; None if it has none, as before there were any."""
    if "attributes" not in instances and "attribute_scores" not in instances:
        return None
    for key in ("attributes", "attribute_scores"):
        if key not in instances:
            raise ValueError(f'{where}: "instances" has no "{key}", but its counterpart.')
    return EntityAttributes.from_lists(
        instances["attributes"], instances["attribute_scores"], len(instances["boxes"]), where
    )


def settings_file(predictions_file: str) -> str:
    """Return the path of a predictions file's settings, in the same folder."""
    stem = predictions_file
    for suffix in (".gz", ".json"):
        stem = stem.removesuffix(suffix)
    return f"{stem}_settings.json"


def write_settings(file: str, settings: dict[str, Any]) -> None:
    """Write next to a predictions file what it was made for, for :func:`read_settings`.

    A hash of the predictions binds the settings to them, so that they never describe a file that
    replaces it.
    """
    with write_atomically(settings_file(file)) as stream:
        json.dump({**settings, "sha256": _content_hash(file)}, stream, indent=2)


def _content_hash(file: str) -> str:
    """Return the SHA-256 of a file's content, of the unpacked content if it is gzipped."""
    digest = hashlib.sha256()
    with open(file, "rb") as raw:
        is_gzipped = raw.read(2) == _GZIP_BEGIN
    with (gzip.open if is_gzipped else open)(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_settings(file: str) -> dict[str, Any]:
    """Return what a predictions file was made for; ``{}`` if it has no settings.

    Returns:
        ``dataset``, ``task``, ``predicates_per_pair`` (for each k in this list the file holds the
        exact best triplets; None means no limit), ``triplets`` (how many of them per image; None
        means all) and, if known, the names of classes, predicates and attributes by id
        (:data:`.name_matching.NAME_FIELDS`).

    Raises:
        ValueError: the settings cannot be read, or belong to another predictions file.
    """
    path = settings_file(file)
    if not os.path.isfile(path) or not os.path.isfile(file):
        return {}
    try:
        with open(path, encoding="utf-8") as stream:
            settings = json.load(stream)
        result = {
            "dataset": settings["dataset"],
            "task": settings["task"],
            # Files that were written before have 0 for no limit.
            "predicates_per_pair": [int(k or 0) or None for k in settings["predicates_per_pair"]],
            "triplets": None if settings["triplets"] is None else int(settings["triplets"]),
            **{field: list(settings[field]) for field in NAME_FIELDS if settings.get(field)},
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected dataset, task, predicates_per_pair and triplets ({error!r}). "
            "Remove the file; the predictions are scored without it."
        ) from error
    _check_bound(file, path, settings.get("sha256"))
    return result


def _check_bound(file: str, path: str, written_for: str | None) -> None:
    """Raise if settings belong to other predictions; warn if they do not say."""
    if written_for is None:
        logger.warning(
            "%s has no hash of the predictions (an older version wrote it), so it may belong to "
            "another file than %s. Remove it if it does.",
            path,
            file,
        )
        return
    try:
        content_hash = _content_hash(file)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return  # reading the predictions says what is wrong with them
    if written_for != content_hash:
        raise ValueError(
            f"{path} was written for other predictions than {file}, which has changed since. "
            "Remove the settings to score the file without them, or put the original file back."
        )
