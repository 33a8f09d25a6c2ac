"""Recall and average precision of each predicate by frequency, from head to tail."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from ..structures.names import table_cell
from ..utils.file_io import write_atomically
from .frequency_groups import GROUPS, by_frequency, frequency_groups
from .metrics import mean_of_defined

__all__ = ["GROUPS", "MAX_SHOWN", "SHOWN_AT_EACH_END", "PredicateTable"]

# A plot or a log has all predicates if there are at most MAX_SHOWN, and otherwise that many of the
# most and of the least frequent ones: 3,000 would make a picture of 60,000 pixels.
MAX_SHOWN, SHOWN_AT_EACH_END = 100, 30
_COLORS = ("#c6d4e3", "#1f5a94", "#d1701f")


@dataclass(frozen=True)
class PredicateTable:
    """All predicates of a dataset under one protocol and one k. P predicates."""

    names: tuple[str, ...]
    counts: np.ndarray  # (P,) ground-truth relations
    training_counts: np.ndarray | None  # (P,) relations of the training set, if known
    recall: np.ndarray  # (P,) percent, NaN where there is no ground truth
    recall_at: int
    average_precision: np.ndarray  # (P,) percent
    group_thresholds: tuple[int, ...] = ()  # see :func:`.frequency_groups`

    @property
    def order(self) -> np.ndarray:
        """Predicate ids, the most frequent (in the training set if known) first."""
        return by_frequency(self.counts, self.training_counts)

    def groups(self) -> dict[str, list[int]]:
        """Return the ids of the predicates that occur for each of :data:`GROUPS`.

        The groups are empty if they depend on frequencies in training, which are unknown.
        """
        groups = frequency_groups(self.counts, self.training_counts, self.group_thresholds)
        return groups or {name: [] for name in GROUPS}

    def shown(self) -> tuple[list[int], list[int]]:
        """Return the ids of the predicates that plots and logs show, in two parts.

        Returns:
            All predicates by :attr:`order` and an empty list; or, if there are more than
            :data:`MAX_SHOWN`, the most frequent ones and the least frequent ones. The latter have
            ground truth, because the others have no recall and no AP.
        """
        order = self.order.tolist()
        if len(order) <= MAX_SHOWN:
            return order, []
        head = order[:SHOWN_AT_EACH_END]
        rest = [p for p in order[SHOWN_AT_EACH_END:] if self.counts[p]]
        return head, rest[-SHOWN_AT_EACH_END:]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types; undefined values are None. ``number`` is a predicate's id."""
        rows = []
        group_of = {p: name for name, members in self.groups().items() for p in members}
        for p in self.order.tolist():
            row: dict[str, Any] = {"predicate": self.names[p], "number": p}
            row["group"] = group_of.get(p)
            if self.training_counts is not None:
                row["training_relations"] = int(self.training_counts[p])
            row["relations"] = int(self.counts[p])
            row["share"] = _defined(100.0 * self.counts[p] / max(int(self.counts.sum()), 1))
            row[f"R@{self.recall_at}"] = _defined(self.recall[p])
            row["AP"] = _defined(self.average_precision[p])
            rows.append(row)
        return {"predicates": rows, "groups": self.group_means()}

    def group_means(self) -> dict[str, dict[str, float | None]]:
        """Return the number of predicates and the means of recall and AP of head, body and tail."""
        return {
            name: {
                "number": len(members),
                f"R@{self.recall_at}": _mean(self.recall[members]),
                "AP": _mean(self.average_precision[members]),
            }
            for name, members in self.groups().items()
        }

    def to_markdown(self) -> str:
        """Return the table, the most frequent predicate first, and the means below it."""
        content = self.to_dict()
        keys = [key for key in content["predicates"][0] if key != "number"] if self.names else []
        rows = [[_cell(row[key]) for key in keys] for row in content["predicates"]]
        align = ["left", "left"] + ["right"] * (len(keys) - 2) if keys else []
        table = tabulate(rows, keys, tablefmt="pipe", colalign=align, disable_numparse=True)
        means = [[name, *map(_cell, values.values())] for name, values in content["groups"].items()]
        heads = ["mean of", "predicates", f"R@{self.recall_at}", "AP"]
        align = ["left"] + ["right"] * 3
        return (
            table
            + "\n\n"
            + tabulate(means, heads, tablefmt="pipe", colalign=align, disable_numparse=True)
        )

    def draw(self, file: Any, title: str) -> None:
        """Draw frequency as bars, recall and AP as points, the most frequent predicate first.

        Of many predicates only :meth:`shown` is drawn, with a gap that says how many are left out.

        Args:
            file: path or binary stream of the PNG.
            title: of the plot.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        head, tail = self.shown()
        order = np.asarray(head + tail, dtype=np.int64)
        where = np.arange(len(order))
        where[len(head) :] += 2 if tail else 0  # the gap
        figure = Figure(figsize=(max(7.0, 0.24 * len(order) + 2.5), 4.8))
        FigureCanvasAgg(figure)
        left = figure.add_subplot()
        bars = self.counts if self.training_counts is None else self.training_counts
        of_set = "" if self.training_counts is None else " in the training set"
        left.bar(where, bars[order], color=_COLORS[0], label=f"relations{of_set}")
        left.set_yscale("symlog", linthresh=1)
        left.set_ylim(bottom=0)
        left.set_ylabel(f"relations{of_set}")
        left.set_xticks(where)
        left.set_xticklabels([_label(self.names[p]) for p in order], rotation=90)
        left.set_xlim(-0.6, where.max(initial=0) + 0.6)
        if tail:
            between = f"{len(self.names) - len(order)} predicates in between are not shown"
            left.axvspan(len(head) - 0.5, len(head) + 1.5, color="#eeeeee")
            place = dict(rotation=90, ha="center", va="center", fontsize="small")
            left.text(len(head) + 0.5, 0.5, between, transform=left.get_xaxis_transform(), **place)
        right = left.twinx()
        right.plot(where, self.recall[order], "o", color=_COLORS[1], label=f"R@{self.recall_at}")
        right.plot(where, self.average_precision[order], "x", color=_COLORS[2], label="AP")
        right.set_ylim(-3, 103)
        right.set_ylabel("percent")
        handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        left.set_title(title, pad=28)
        place = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0))
        left.legend(handles=handles, ncol=3, frameon=False, **place)
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")

    def write(self, folder: str, name: str, title: str) -> list[str]:
        """Write ``per_predicate_<name>`` as .json, .md and .png and return the paths."""
        paths = [os.path.join(folder, f"per_predicate_{name}.{x}") for x in ("json", "md", "png")]
        with write_atomically(paths[0]) as stream:
            json.dump(self.to_dict(), stream, indent=1)
        with write_atomically(paths[1]) as stream:
            stream.write(f"# {title}\n\n{self.to_markdown()}\n")
        with write_atomically(paths[2], "wb") as stream:
            self.draw(stream, title)
        return paths


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float | None:
    return _defined(mean_of_defined(values))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else table_cell(str(value))


def _label(name: str) -> str:
    """Return a name as one short line without matplotlib's markup (``$``)."""
    line = " ".join(name.split())
    line = line if len(line) <= 40 else f"{line[:39]}…"
    return line.replace("$", r"\$")
