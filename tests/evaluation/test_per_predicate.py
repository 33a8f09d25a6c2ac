"""Tables and plots of single predicates."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from reldn_d2.evaluation.per_predicate import MAX_SHOWN, PredicateTable


def predicate_table(names, counts=None):
    size = len(names)
    counts = np.arange(size, 0, -1) if counts is None else np.asarray(counts)
    values = np.linspace(0, 100, size)
    return PredicateTable(tuple(names), counts, None, values, 50, values)


def test_to_markdown_names_with_pipes_and_line_breaks_keep_the_table():
    names = ["on|under", "next\nto", "a\r\nb|c", "plain"]
    lines = predicate_table(names).to_markdown().split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(names)
    # An escaped pipe is text; the others separate the columns.
    assert {line.replace(r"\|", "").count("|") for line in lines} == {lines[0].count("|")}
    assert r"on\|under" in lines[2] and "next to" in lines[3] and r"a b\|c" in lines[4]


@pytest.mark.parametrize("size", [1, 70, MAX_SHOWN])
def test_shown_few_predicates_are_all(size):
    head, tail = predicate_table([f"p{i}" for i in range(size)]).shown()
    assert head == list(range(size)) and tail == []


def test_shown_many_predicates_are_head_and_tail_that_occur():
    counts = [3000 - i if i < 2000 else 0 for i in range(3000)]
    head, tail = predicate_table([f"p{i}" for i in range(3000)], counts).shown()
    assert head == list(range(30)) and tail == list(range(1970, 2000))
    head, tail = predicate_table([f"p{i}" for i in range(3000)], [0] * 3000).shown()
    assert head == list(range(30)) and tail == []


def test_write_3000_predicates_bounds_the_plot_and_keeps_the_tables(tmp_path):
    table = predicate_table([f"predicate {i}" for i in range(3000)])
    start = time.process_time()
    files = table.write(str(tmp_path), "many", "title")
    assert time.process_time() - start < 10
    assert len(json.loads((tmp_path / "per_predicate_many.json").read_text())["predicates"]) == 3000
    text = (tmp_path / "per_predicate_many.md").read_text()
    assert all(f"| predicate {i} " in text for i in range(3000))
    with Image.open(files[2]) as plot:
        assert max(plot.size) < 3000


@pytest.mark.parametrize("name", ["$x^2", "a|b", "line\nbreak", "long " * 50, ""])
def test_write_any_name(tmp_path, name):
    files = predicate_table([name, "on"]).write(str(tmp_path), "any", "title")
    with Image.open(files[2]) as plot:
        assert max(plot.size) < 3000
