"""Summarize a dataset with relations as text for the terminal."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .frequency import count_related_pairs

__all__ = ["DatasetSummary"]


@dataclass
class DatasetSummary:
    """Counts of a dataset; add its images one by one with :meth:`add`."""

    thing_classes: Sequence[str]
    predicate_classes: Sequence[str]
    attribute_classes: Sequence[str] = ()
    images: int = 0
    boxes: int = 0
    relations: int = 0
    images_without_relations: int = 0
    most_boxes: int = 0
    most_relations: int = 0
    related_pairs: int = 0
    apart_pairs: int = 0  # related pairs whose boxes do not overlap
    multi_label_pairs: int = 0  # related pairs with several predicates
    attributed_boxes: int = 0  # whose attributes are annotated, if only that there are none
    verified_labels: int = 0
    class_counts: np.ndarray = field(init=False)  # (C,) int64
    predicate_counts: np.ndarray = field(init=False)  # (P,) int64
    attribute_counts: np.ndarray = field(init=False)  # (A,) int64

    def __post_init__(self) -> None:
        self.class_counts = np.zeros(len(self.thing_classes), dtype=np.int64)
        self.predicate_counts = np.zeros(len(self.predicate_classes), dtype=np.int64)
        self.attribute_counts = np.zeros(len(self.attribute_classes), dtype=np.int64)

    def add(self, record: dict[str, Any]) -> None:
        """Count one image, a dataset dict without errors."""
        annotations, relations = record["annotations"], record.get("relations", ())
        self.images += 1
        self.boxes += len(annotations)
        self.relations += len(relations)
        self.images_without_relations += not relations
        self.most_boxes = max(self.most_boxes, len(annotations))
        self.most_relations = max(self.most_relations, len(relations))
        self.verified_labels += len(record.get("verified_labels", ()))
        for annotation in annotations:
            self.class_counts[annotation["category_id"]] += 1
            self.attributed_boxes += "attributes" in annotation
            for attribute in annotation.get("attributes", ()):
                self.attribute_counts[attribute] += 1
        predicates: dict[tuple[int, int], set[int]] = {}
        for subject, object_, predicate in relations:
            self.predicate_counts[predicate] += 1
            predicates.setdefault((subject, object_), set()).add(predicate)
        self.multi_label_pairs += sum(len(x) > 1 for x in predicates.values())
        related, apart = count_related_pairs([record])
        self.related_pairs += related
        self.apart_pairs += apart

    def text(self, name: str, width: int | None = None) -> str:
        """Return the summary with a bar chart of the predicates.

        Args:
            name: name of the dataset.
            width: columns of the terminal; read from it when None.
        """
        lines = [
            f"{name}: {self.images:,} images, {self.boxes:,} boxes, {self.relations:,} relations",
            f"  boxes per image: {self.boxes / max(self.images, 1):.1f}, at most {self.most_boxes}",
            f"  relations per image: {self.relations / max(self.images, 1):.1f}, at most "
            f"{self.most_relations}",
            f"  images without relations: {_share(self.images_without_relations, self.images)}",
            f"  related pairs whose boxes do not overlap: "
            f"{_share(self.apart_pairs, self.related_pairs)}",
            f"  related pairs with several predicates: "
            f"{_share(self.multi_label_pairs, self.related_pairs)}",
        ]
        if self.attribute_classes:
            lines.append(
                "  boxes with annotated attributes: "
                f"{_share(self.attributed_boxes, self.boxes)}, with "
                f"{self.attribute_counts.sum():,} attributes"
            )
        if self.verified_labels:
            lines.append(f"  verified image-level labels: {self.verified_labels:,}")
        lines.append(_unused_names(self.thing_classes, self.class_counts, "classes"))
        lines.append(_unused_names(self.predicate_classes, self.predicate_counts, "predicates"))
        if self.attribute_classes:
            lines.append(_unused_names(self.attribute_classes, self.attribute_counts, "attributes"))
        lines += ["", "relations per predicate"]
        lines += _bars(self.predicate_classes, self.predicate_counts, width)
        return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f" ({part / whole:.1%})" if whole else "")


def _unused_names(names: Sequence[str], counts: np.ndarray, what: str) -> str:
    missing = [names[i] for i in np.flatnonzero(counts == 0)]
    text = f"  {what}: {len(names)}"
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        text += f", {len(missing)} of which never occur: {shown}"
    return text


def _bars(names: Sequence[str], counts: np.ndarray, width: int | None) -> list[str]:
    """Return one line per predicate that occurs, most frequent first."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    block = "\u2588" if encoding.lower().replace("-", "").startswith("utf") else "#"
    name_width = max((len(name) for name in names), default=0)
    digits = len(f"{counts.max(initial=0):,}")
    longest = max(width - name_width - digits - 14, 10)
    lines = []
    for index in np.argsort(-counts, kind="stable").tolist():
        count = int(counts[index])
        if count:
            bar = block * max(round(longest * count / int(counts.max())), 1)
            share = count / int(counts.sum())
            lines.append(f"  {names[index]:<{name_width}} {count:>{digits},} {share:>6.1%} {bar}")
    return lines
