"""The files of a bulk prediction: repaired after a kill, refused for another run."""

import json
import multiprocessing

import pytest

from reldn_d2.bulk import output_folder
from reldn_d2.bulk.output_folder import (
    BulkOutput,
    check_run,
    read_part_keys,
    to_record,
    write_part,
)
from reldn_d2.structures.attributes import EntityAttributes
from reldn_d2.structures.scene_graph import SceneGraph

RUN = {"options": {"top_k": 20, "sizes": (1, 2)}, "model": {"weights": "abc"}}


def graph(score: float = 0.5, **fields) -> SceneGraph:
    """Return a scene graph of two entities and one relation."""
    boxes = [[0.25, 0, 5, 5], [1, 1, 9, 9]]
    return SceneGraph.from_arrays(
        None, boxes, [0, 1], [0.9, 0.8], [[0, 1]], [2], [score], [0.7], image_size=(9, 9), **fields
    )


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=["jsonl", "parquet"])
def kind(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    return request.param


def read(folder, kind) -> list[dict]:
    """Return all records of a folder as a user reads them, without null."""
    if kind == "jsonl":
        return [x for file in sorted(folder.glob("part-*.jsonl")) for x in lines(file)]
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(folder).to_table()  # skips the other files

    def without_null(value):
        if not isinstance(value, dict):
            return value
        return {key: without_null(x) for key, x in value.items() if x is not None}

    return [without_null(x) for x in table.to_pylist(maps_as_pydicts="strict")]


def test_bulk_output_records_roundtrip(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "ROWS_PER_FILE", 2)
    attributes = EntityAttributes.from_annotations([{"attributes": [1, 0]}, {"attributes": []}])
    graphs = {
        "a.png": graph(file_name="photos/a.png"),
        "ü/中.png": graph(0.25, thing_classes=["x", "y"], predicate_classes=["p", "q", "r"]),
        "c.png": graph(left_out={3: "zebra"}, attributes=attributes),
        "d.png": SceneGraph.empty(),
        "e.png": graph(0.125),
    }
    with BulkOutput(tmp_path / "out", kind, RUN) as output:
        for key, value in graphs.items():
            output.write(key, value)
        output.write_error("f.png", "f.png: the file is empty")
    expected = [to_record(key, value) for key, value in graphs.items()]
    assert expected[0] == {"key": "a.png", **graphs["a.png"].to_dict()}
    assert read(tmp_path / "out", kind) == expected
    names = sorted(x.name for x in (tmp_path / "out").iterdir())
    count = 1 if kind == "jsonl" else 3
    parts = [f"part-{i:05}.{kind}" for i in range(count)]
    assert names == ["_errors.jsonl", "_run.json", *parts]
    with BulkOutput(tmp_path / "out", kind, RUN) as output:
        assert output.done == {*graphs, "f.png"} and output.error_count == 1
    assert read(tmp_path / "out", kind) == expected


@pytest.mark.parametrize("torn", ['{"key": "c.png", "inst', '{"key": "c.png"}', "\0\0\0", "{"])
def test_bulk_output_torn_last_line_is_cut_off(torn, kind, tmp_path):
    with pytest.raises(InterruptedError), BulkOutput(tmp_path, kind, RUN) as output:
        output.write("a.png", graph())
        output.write("b" * 200_000, graph())  # longer than what is read at once
        raise InterruptedError
    prefix = "" if kind == "jsonl" else "_"
    for file in (tmp_path / f"{prefix}part-00000.jsonl", tmp_path / "_errors.jsonl"):
        with open(file, "a") as stream:
            stream.write(torn)
    with BulkOutput(tmp_path, kind, RUN) as output:
        assert output.done == {"a.png", "b" * 200_000} and output.error_count == 0
        output.write("c.png", graph())
        output.write_error("d.png", "bad")
    assert [x["key"] for x in read(tmp_path, kind)] == ["a.png", "b" * 200_000, "c.png"]
    assert lines(tmp_path / "_errors.jsonl") == [{"key": "d.png", "reason": "bad"}]


def test_bulk_output_damaged_line_raises(tmp_path):
    with BulkOutput(tmp_path, "jsonl", RUN) as output:
        output.write("a.png", graph())
    file = tmp_path / "part-00000.jsonl"
    for damaged in ("\0\0\0\n", "[1]\n", '{"key": 3}\n', '{"other": "a"}\n', '{"key": "b"\n'):
        file.write_text(file.read_text().splitlines()[0] + "\n" + damaged)
        with pytest.raises(ValueError, match="part-00000.jsonl, line 2 is damaged: remove it"):
            BulkOutput(tmp_path, "jsonl", RUN)


def test_bulk_output_killed_after_parquet_file_repeats_nothing(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    monkeypatch.setattr(output_folder, "ROWS_PER_FILE", 2)
    with pytest.raises(InterruptedError), BulkOutput(tmp_path, "parquet", RUN) as output:
        output.write("a.png", graph())
        before = (tmp_path / "_part-00000.jsonl").read_bytes()
        output.write("b.png", graph())
        output.write("c.png", graph())
        raise InterruptedError
    (tmp_path / "_part-00000.jsonl").write_bytes(before)
    with BulkOutput(tmp_path, "parquet", RUN) as output:
        assert output.done == {"a.png", "b.png", "c.png"}
    assert [x["key"] for x in read(tmp_path, "parquet")] == ["a.png", "b.png", "c.png"]
    (tmp_path / "part-00000.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="part-00000.parquet is damaged: .*; remove it"):
        BulkOutput(tmp_path, "parquet", RUN)


def test_bulk_output_other_run_raises(tmp_path):
    BulkOutput(tmp_path, "jsonl", RUN).__exit__(None)
    other = {"options": {"top_k": 10, "sizes": [1, 2], "new": "x" * 99}, "model": RUN["model"]}
    message = r"another run: --top-k was 20 and is 10; --new was not given and is \"x{56}\.\.\."
    with pytest.raises(ValueError, match=message):
        BulkOutput(tmp_path, "jsonl", other)
    with pytest.raises(ValueError, match='--format was "jsonl" and is "parquet"'):
        BulkOutput(tmp_path, "parquet", RUN)
    (tmp_path / "_run.json").write_text("{")
    with pytest.raises(ValueError, match="_run.json: this is not JSON"):
        BulkOutput(tmp_path, "jsonl", RUN)
    (tmp_path / "_run.json").unlink()
    (tmp_path / "_errors.jsonl").unlink()
    with pytest.raises(ValueError, match="has part-00000.jsonl, but no _run.json"):
        BulkOutput(tmp_path, "jsonl", RUN)
    assert [x.name for x in tmp_path.iterdir()] == ["part-00000.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        BulkOutput(tmp_path / "file", "jsonl", RUN)


@pytest.mark.parametrize(
    "before, now, message",
    [
        ({"boxes": "0" * 64}, {"boxes": "1" * 64}, "run: the content of --boxes changed. Give"),
        ({"boxes": None}, {"boxes": "1" * 64}, "run: --boxes was not given and is given. Give"),
        ({"shard_size": 1000}, {"shard_size": 8}, "run: --shard-size was 1000 and is 8. Give"),
        ({"shard_size": 8}, {"shard_size": 8}, "run: the images of --input changed. Give"),
        (
            {"detector": "a", "detector_content": "a", "detector_weights": None},
            {"detector": "b", "detector_content": "b", "detector_weights": "1" * 64},
            'run: --detector was "a" and is "b". Give',
        ),
    ],
)
def test_check_run_names_the_options_that_changed(before, now, message, tmp_path):
    images = ("2" * 64, "3" * 64 if "shard_size" in now else "2" * 64)
    check_run(tmp_path, {"options": before, "images": images[0]})
    with pytest.raises(ValueError, match=message):
        check_run(tmp_path, {"options": now, "images": images[1]})


def test_bulk_output_second_process_raises(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    processes = multiprocessing.get_context("fork")
    queue = processes.SimpleQueue()

    def write_again():
        try:
            BulkOutput(tmp_path, "jsonl", {"a": 1})
            queue.put("no error")
        except ValueError as error:
            queue.put(str(error))

    with BulkOutput(tmp_path, "jsonl", {"a": 1}) as output:
        output._errors.write(b'{"key": ')  # a line that is being written
        output._errors.flush()
        second = processes.Process(target=write_again)
        second.start()
        assert f"another process writes into {tmp_path}: wait for it" in queue.get()
        second.join()
    assert (tmp_path / "_errors.jsonl").read_text() == '{"key": '


def test_bulk_output_locked_folder_gets_no_description(tmp_path, monkeypatch):
    def refuse(file, folder):
        raise ValueError("another process writes into it")

    monkeypatch.setattr(output_folder, "_lock", refuse)
    with pytest.raises(ValueError, match="another process"):
        BulkOutput(tmp_path / "out", "jsonl", RUN)
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["_errors.jsonl"]


def test_write_part_is_replaced_as_a_whole(kind, tmp_path):
    check_run(tmp_path, RUN)
    records = [to_record(key, graph()) for key in ("a.png", "b.png")]
    write_part(tmp_path, "000003", kind, records[:1], [("b.png", "bad")])
    assert read_part_keys(tmp_path, "000003", kind) == (["a.png"], ["b.png"])
    write_part(tmp_path, "000003", kind, records, [])
    assert read(tmp_path, kind) == records
    assert read_part_keys(tmp_path, "000003", kind) == (["a.png", "b.png"], [])
    assert not (tmp_path / "_errors-000003.jsonl").exists()
    write_part(tmp_path, "000004", kind, [], [("c.png", "bad")])
    assert read(tmp_path, kind) == records
    assert read_part_keys(tmp_path, "000004", kind) == ([], ["c.png"])


def test_write_part_unknown_field_raises(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    record = {**to_record("a.png", graph()), "mood": 1}
    record["relations"]["why"] = []
    with pytest.raises(ValueError, match="no Parquet column for mood, relations.why"):
        write_part(tmp_path, "000000", "parquet", [record], [])
