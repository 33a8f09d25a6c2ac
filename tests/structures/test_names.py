"""Names as they stand in one line of a picture or in a table."""

import pytest
from tabulate import tabulate

from reldn_d2.structures.names import one_line, table_cell, with_attributes


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sitting  on", "sitting  on"),
        ("in\nfront of", "in front of"),
        (" a \r\n\r\n b\t c ", "a b c"),
        ("a\u2028b\x85c\vd", "a b c d"),
        ("\u9a91\u5728", "\u9a91\u5728"),
    ],
)
def test_one_line_replaces_line_breaks(text, expected):
    assert one_line(text) == expected


def test_table_cell_keeps_the_table_whole():
    rows = [[table_cell(x), 1] for x in ("on | under", "in\nfront", "plain")]
    lines = tabulate(rows, ["predicate", "count"], tablefmt="pipe").splitlines()
    assert len(lines) == 5
    assert [line.replace("\\|", "").count("|") for line in lines] == [3] * 5
    assert "on \\| under" in lines[2]


def test_with_attributes_shows_three():
    assert with_attributes("cup 2", []) == "cup 2"
    assert with_attributes("cup 2", ["red", "old"]) == "cup 2 (red, old)"
    assert with_attributes("cup", ["red", "old", "wet"]) == "cup (red, old, wet)"
    assert with_attributes("cup", ["red", "old", "wet", "big"]) == "cup (red, old, wet, ...)"
