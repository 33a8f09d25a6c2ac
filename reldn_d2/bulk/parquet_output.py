"""Parquet files with one row per image, in the schema of docs/bulk.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..utils.file_io import write_atomically
from .image_sources import import_parquet

__all__ = ["read_keys", "schema", "write_rows"]

_STRUCTS = ("instances", "relations")


def schema() -> Any:
    """Return the ``pyarrow.Schema`` of a row; missing values are null.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import_parquet()
    import pyarrow as pa

    text, index, real = pa.string(), pa.int32(), pa.float64()
    instances = {
        "boxes": pa.list_(pa.list_(real)),
        "classes": pa.list_(index),
        "class_names": pa.list_(text),
        "scores": pa.list_(real),
        "attributes": pa.list_(pa.list_(index)),
        "attribute_names": pa.list_(pa.list_(text)),
        "attribute_scores": pa.list_(pa.list_(real)),
    }
    relations = {
        "pairs": pa.list_(pa.list_(index)),
        "predicates": pa.list_(index),
        "predicate_names": pa.list_(text),
        "scores": pa.list_(real),
        "predicate_scores": pa.list_(real),
    }
    return pa.schema(
        {
            "key": text,
            "file_name": text,
            "height": index,
            "width": index,
            "instances": pa.struct(instances),
            "relations": pa.struct(relations),
            "left_out": pa.map_(text, text),
        }
    )


def write_rows(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records atomically to a Parquet file.

    Args:
        path: of the file.
        records: see :func:`.output_folder.to_record`.
    """
    import pyarrow as pa

    columns = schema()
    rows = []
    for record in records:
        _check_fields(record, columns)
        left_out = record.get("left_out")
        rows.append({**record, "left_out": None if left_out is None else list(left_out.items())})
    table = pa.Table.from_pylist(rows, schema=columns)
    with write_atomically(path, "wb") as file:
        import_parquet().write_table(table, file, compression="zstd")


def _check_fields(record: Mapping[str, Any], columns: Any) -> None:
    """Raise if a record has a field without a column, which pyarrow would silently drop."""
    known = {name: {field.name for field in columns.field(name).type} for name in _STRUCTS}
    unknown = record.keys() - set(columns.names)
    unknown |= {f"{x}.{y}" for x in _STRUCTS for y in record.get(x, {}).keys() - known[x]}
    if unknown:
        raise ValueError(f"no Parquet column for {', '.join(sorted(unknown))}; use JSON Lines")


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file's rows, in order.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return import_parquet().read_table(path, columns=["key"])["key"].to_pylist()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}; remove it and run again") from None
