"""The blocks of docs/bulk.md that need pandas and pyarrow, and its table of fields."""

import re

import pytest
from model_utils import ROOT
from PIL import Image
from usage_utils import picture, write_checkpoint

import demo as demo_script

TEXT = (ROOT / "docs/bulk.md").read_text(encoding="utf-8")


def test_documented_defaults_are_those_of_the_options():
    args = vars(demo_script.build_parser().parse_args(["--input", "a"]))
    found = dict(re.findall(r"`--([\w-]+)` \(default ([\d.]+)\)", TEXT))
    assert found.keys() == {"top-k", "min-score", "batch-size", "workers"}
    del found["workers"]  # None for the other formats
    assert all(args[name.replace("-", "_")] == float(value) for name, value in found.items())


def test_reading_with_pandas_and_pyarrow(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="the block needs pandas")
    pytest.importorskip("pyarrow", reason="the block needs pyarrow")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        Image.fromarray(picture(seed=seed)).save(tmp_path / f"photos/{seed}.png")
    (tmp_path / "photos/text.jpg").write_text("hello")
    model = ["--checkpoint", str(write_checkpoint(tmp_path)), "--device", "cpu", "--workers", "0"]
    for kind, out in (("jsonl", "found"), ("parquet", "found_parquet")):
        arguments = ["--input", "photos", "--output", out, "--format", kind]
        assert demo_script.main([*model, *arguments]) == 1
    (block,) = re.findall(r"^```python no-run.*?\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) == 3
    names: dict = {}
    exec(compile(block, "docs/bulk.md", "exec"), names)
    assert names["table"]["key"].tolist() == ["0.png", "1.png", "2.png"]
    assert [x["key"] for x in names["rows"]] == ["0.png", "1.png", "2.png"]
    (other,) = re.findall(r"# or (.*)", block)
    lines = eval(other, names)
    assert lines["relations"][1] == {
        key: x for key, x in names["rows"][1]["relations"].items() if x is not None
    }


def test_table_of_fields_is_the_schema():
    pytest.importorskip("pyarrow", reason="the schema needs pyarrow")
    from reldn_d2.bulk.parquet_output import schema

    (table,) = re.findall(r"^\| field \|.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    documented = [name.split(".")[-1] for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]
    actual = []
    for field in schema():
        is_struct = field.name in ("instances", "relations")
        actual += [x.name for x in field.type] if is_struct else [field.name]
    assert sorted(documented) == sorted(actual)
