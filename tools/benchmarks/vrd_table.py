"""Columns of the benchmark on VRD's boxes, and its table as in docs/benchmarks.md."""

from collections.abc import Sequence
from typing import Any

__all__ = [
    "ACCURACIES",
    "LOSSES_CORNER",
    "LOSSES_TABLE",
    "PUBLISHED",
    "RECALLS",
    "RECALL_AT",
    "TABLE",
    "format_table",
]

# Published on the same detections (Lu et al., ECCV 2016): the scores of their result file in this
# protocol; for annotated pairs their paper has 47.87. Nothing else is published on them.
PUBLISHED = {
    "name": "Lu et al. 2016, vision + language, published",
    "seeds": [],
    "relationship_k1": [14.11, 14.96],
    "phrase_k1": [None, 17.33],
    "zero_shot_k1": [None, 5.39],
    "annotated_pairs_k1": [48.73, 48.73],
}

# Column of the report: block and metrics of an evaluation.
RECALLS = {
    "relationship_k1": ("lu2016_sgdet_k1", "relationship R@{}"),
    "relationship_k70": ("lu2016_sgdet_k70", "relationship R@{}"),
    "phrase_k1": ("lu2016_sgdet_k1", "phrase R@{}"),
    "phrase_k70": ("lu2016_sgdet_k70", "phrase R@{}"),
    "zero_shot_k1": ("lu2016_sgdet_k1", "zero-shot relationship R@{}"),
    "annotated_pairs_k1": ("lu2016_preddet_k1", "predicate R@{}"),
    "all_pairs_k1": ("lu2016_prdcls_k1", "predicate R@{}"),
    "all_pairs_k70": ("lu2016_prdcls_k70", "predicate R@{}"),
}
ACCURACIES = ("instance_accuracy", "pairing_accuracy")  # with all predicates, boxes given
RECALL_AT = (50, 100)
# Head of each column of the printed table, its key in the report, and the n of R@n that it shows.
_ACCURACY_COLUMNS = [(name.replace("_", " "), name, ()) for name in ACCURACIES]
TABLE = [
    ("relationship R@50 / R@100, k = 1", "relationship_k1", RECALL_AT),
    ("k = 70", "relationship_k70", RECALL_AT),
    ("phrase R@100, k = 1", "phrase_k1", (100,)),
    ("k = 70", "phrase_k70", (100,)),
    ("zero-shot R@100, k = 1", "zero_shot_k1", (100,)),
    ("annotated pairs R@100, k = 1", "annotated_pairs_k1", (100,)),
    ("all pairs R@100, k = 1", "all_pairs_k1", (100,)),
    ("k = 70", "all_pairs_k70", (100,)),
    *_ACCURACY_COLUMNS,
]
LOSSES_CORNER = "model, pairs per image, losses"
LOSSES_TABLE = [("R@100", "all_pairs_k70", (100,)), *_ACCURACY_COLUMNS]


def format_table(rows: Sequence[dict[str, Any]], table: Sequence[Any], corner: str = "%") -> str:
    """Format rows as a Markdown table: mean ± standard deviation, as in docs/benchmarks.md.

    Args:
        rows: of the report; a dash marks what a row lacks.
        table: columns, such as :data:`TABLE`.
        corner: head of the names.
    """

    def cell(row: dict[str, Any], column: str, recall_at: Sequence[int]) -> str:
        means, deviations = row.get(column), row.get("deviation", {}).get(column)
        if means is None:
            return "-"
        if not recall_at:
            return number(means, deviations, len(row["seeds"]) > 1)
        shown = [RECALL_AT.index(n) for n in recall_at]
        spread = deviations or [None, None]
        return " / ".join(number(means[i], spread[i], len(row["seeds"]) > 1) for i in shown)

    def number(mean: float, deviation: float | None, several: bool) -> str:
        return f"{mean:.2f} ± {deviation:.2f}" if several else f"{mean:.2f}"

    lines = [[corner, *(head for head, _, _ in table), "seeds", "training"]]
    for row in rows:
        seconds = row.get("training_seconds")
        lines.append(
            [
                row["name"],
                *(cell(row, column, recall_at) for _, column, recall_at in table),
                str(len(row["seeds"]) or "-"),
                "-" if seconds is None else f"{seconds:.0f} s",
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    text = [f"| {' | '.join(line)} |" for line in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(text)
