"""The output of a bulk prediction: a folder that a killed run continues without repeating an image.

Files::

    part-00000.jsonl, ...     one line per image; or part-00000.parquet, ..., one row per image
    _errors.jsonl             {"key": ..., "reason": ...} for each image that cannot be used
    _run.json                 the model and the options; another run is refused
    _part-00003.jsonl         lines that become the next Parquet file

Readers of folders, such as pyarrow's, skip names that start with "_".
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..structures.scene_graph import SceneGraph
from ..utils.file_io import check_writable_folder, write_atomically
from .parquet_output import read_keys, write_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "FORMATS",
    "BulkOutput",
    "check_run",
    "is_complete",
    "read_part_keys",
    "to_record",
    "write_part",
]

FORMATS = ("jsonl", "parquet")
RUN_FILE = "_run.json"
ERROR_FILE = "_errors.jsonl"
ROWS_PER_FILE = 10_000  # of a Parquet file

# Entries of a run's description that are hashes.
_HASHES = {
    "options.boxes": "the content of --boxes",
    "options.detections": "the content of --detections",
    "options.detector_content": "the content of --detector",
    "options.detector_weights": "the weights of the detector",
    "model.weights": "the weights of the model",
    "model.names": "the names of classes, predicates or attributes",
    "images": "the images of --input",
}
# Entries that always differ if others do.
_FOLLOWS = {
    "images": {"input", "options.shard_size"},
    "options.detector_content": {"options.detector"},
    "options.detector_weights": {"options.detector", "options.detector_content"},
}


def to_record(key: str, graph: SceneGraph) -> dict[str, Any]:
    """Return the line of an image: its key and what ``graph.to_dict()`` has."""
    return {"key": key, **graph.to_dict()}


def to_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON in ASCII."""
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def check_run(folder: Path, description: Mapping[str, Any], write: bool = True) -> None:
    """Create the folder, or check that what is in it belongs to the same run.

    Args:
        folder: of the output.
        description: of the run, nested dicts of plain types: whatever decides about its results.
        write: whether the description of a new run is written into the folder.

    Raises:
        ValueError: the folder has results of another run; the message names the differences.
        OSError: it cannot be written.
    """
    file = folder / RUN_FILE
    description = json.loads(json.dumps(description))  # tuples are lists in the file
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: this is not JSON ({error}); give another folder") from None
        found = {name: values for name, *values in _differences(before, description)}
        differences = [
            _describe(name, *values)
            for name, values in found.items()
            if not _FOLLOWS.get(name, set()) & found.keys()
        ]
        if differences:
            shown = "; ".join(differences[:3])
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ValueError(
                f"{folder} has results of another run: {shown}{more}. Give another folder, or "
                "repeat the command that began it"
            )
        check_writable_folder(folder)
        return
    found = sorted(x.name for x in folder.glob("*part-*")) if folder.is_dir() else []
    if found:
        raise ValueError(f"{folder} has {found[0]}, but no {RUN_FILE}: give another folder")
    check_writable_folder(folder)
    if write:
        with write_atomically(file) as stream:
            json.dump(description, stream, indent=1)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs, such as ``("options.top_k", 20, 10)``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _describe(name: str, before: Any, now: Any) -> str:
    """Return a difference in the words of the command line, such as "--top-k was 20 and is 10"."""
    values = [_short(x) for x in (before, now)]
    if name in _HASHES:
        if before is not None and now is not None:
            return f"{_HASHES[name]} changed"
        values = ["not given" if x is None else "given" for x in (before, now)]
    if name in ("format", "input") or name.startswith("options."):
        name = "--" + name.removeprefix("options.").replace("_", "-")
    return f"{name} was {values[0]} and is {values[1]}"


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class BulkOutput:
    """Writes the results of one process.

    Use it as a context manager. Results are in the files as soon as :meth:`write` returns, so that
    a killed run loses none.

    Attributes:
        done: keys of the images that have a result or an error.
        error_count: of these, how many have an error.
    """

    def __init__(self, folder: Path, kind: str, description: Mapping[str, Any]):
        """
        Args:
            folder: of the output; its name must not be that of a file.
            kind: "jsonl" or "parquet".
            description: see :func:`check_run`.

        Raises:
            ValueError: as :func:`check_run`, or another process writes into the folder, or a file
                in it is damaged.
        """
        self.folder = folder
        self.kind = kind
        description = {"format": kind, **description}
        check_run(folder, description, write=False)  # nothing is written into another run's folder
        folder.mkdir(parents=True, exist_ok=True)
        self._errors = open(folder / ERROR_FILE, "a+b")
        try:
            _lock(self._errors, folder)
            check_run(folder, description)
            _repair(self._errors)
            errors = list(_read_keys(self._errors, folder / ERROR_FILE))
            self.error_count = len(errors)
            self.done = set(errors)
            self._open_parts()
        except BaseException:
            self._errors.close()
            raise

    def _open_parts(self) -> None:
        self._index = self._rows = 0
        if self.kind == "parquet":
            for file in sorted(self.folder.glob("part-*.parquet")):
                self.done.update(read_keys(file))
                self._index = int(file.stem.removeprefix("part-")) + 1
            # Of a run that was killed after it had made the Parquet file, before it removed these.
            for file in self.folder.glob("_part-*.jsonl"):
                if int(file.stem.removeprefix("_part-")) < self._index:
                    file.unlink()
        self._open_lines()

    def _open_lines(self) -> None:
        prefix = "_" if self.kind == "parquet" else ""
        self._path = self.folder / f"{prefix}part-{self._index:05}.jsonl"
        self._lines = open(self._path, "a+b")
        _repair(self._lines)
        keys = list(_read_keys(self._lines, self._path))
        self._rows = len(keys)
        self.done.update(keys)

    def __enter__(self) -> "BulkOutput":
        return self

    def __exit__(self, error_type: type | None, *_: Any) -> None:
        try:
            if self.kind == "parquet" and error_type is None:
                self._finish_part()
        finally:
            self._lines.close()
            self._errors.close()

    def write(self, key: str, graph: SceneGraph) -> None:
        """Write the result of an image."""
        _append(self._lines, to_line(to_record(key, graph)))
        self.done.add(key)
        self._rows += 1
        if self.kind == "parquet" and self._rows >= ROWS_PER_FILE:
            self._finish_part()
            self._index += 1
            self._open_lines()

    def write_error(self, key: str, reason: str) -> None:
        """Write why an image has no result."""
        _append(self._errors, to_line({"key": key, "reason": reason}))
        self.done.add(key)
        self.error_count += 1

    def _finish_part(self) -> None:
        """Turn the lines into a Parquet file."""
        self._lines.seek(0)
        if self._rows:
            target = self.folder / f"part-{self._index:05}.parquet"
            write_rows(target, (json.loads(line) for line in self._lines))
        self._lines.close()
        self._path.unlink()


def _repair(file: IO[bytes]) -> None:
    """Cut off an incomplete last line and go to the start of the file."""
    end = position = file.seek(0, os.SEEK_END)
    while position:  # backwards to the last line's end
        start = max(position - 65536, 0)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != end:
        file.truncate(position)
    file.seek(0)


def _append(file: IO[bytes], line: bytes) -> None:
    """Write a line so that it is in the file when this returns; an error names the file."""
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def _read_keys(file: IO[bytes], path: Path) -> Iterator[str]:
    """Yield the key of each line, which begins with it.

    Raises:
        ValueError: a line is damaged.
    """
    start = '{"key": '
    decoder = json.JSONDecoder()
    for index, line in enumerate(file, 1):
        try:
            text = line.decode("ascii")
            key, _ = decoder.raw_decode(text, len(start))
            valid = text.startswith(start) and text.endswith("}\n") and isinstance(key, str)
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{path}, line {index} is damaged: remove it and run again")
        yield key


def _lock(file: IO[bytes], folder: Path) -> None:
    """Lock a file as long as it is open; unlike ``flock``, worker processes do not keep the lock.

    Raises:
        ValueError: another process has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process writes into {folder}: wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass


def write_part(
    folder: Path,
    name: str,
    kind: str,
    records: Iterable[Mapping[str, Any]],
    errors: Iterable[tuple[str, str]],
) -> None:
    """Write one part and its errors, each atomically; errors first, so that a part is complete.

    Args:
        folder: of the output.
        name: of the part, such as "00012".
        kind: "jsonl" or "parquet".
        records: see :func:`to_record`.
        errors: (key, reason) of the images without a record.
    """
    lines = [to_line({"key": key, "reason": reason}) for key, reason in errors]
    error_file = folder / f"_errors-{name}.jsonl"
    if lines:
        with write_atomically(error_file, "wb") as file:
            file.writelines(lines)
    else:
        error_file.unlink(missing_ok=True)
    target = folder / f"part-{name}.{kind}"
    if kind == "parquet":
        write_rows(target, records)
        return
    with write_atomically(target, "wb") as file:
        file.writelines(to_line(record) for record in records)


def is_complete(folder: Path, name: str, kind: str) -> bool:
    """Whether :func:`write_part` has written a part."""
    return (folder / f"part-{name}.{kind}").exists()


def read_part_keys(folder: Path, name: str, kind: str) -> tuple[list[str], list[str]]:
    """Return the keys of a part's records and those of its errors.

    Raises:
        ValueError: the part is damaged.
    """

    def read_lines(path: Path) -> list[str]:
        with open(path, "rb") as file:
            return list(_read_keys(file, path))

    part, error_file = folder / f"part-{name}.{kind}", folder / f"_errors-{name}.jsonl"
    keys = read_keys(part) if kind == "parquet" else read_lines(part)
    return keys, read_lines(error_file) if error_file.exists() else []
