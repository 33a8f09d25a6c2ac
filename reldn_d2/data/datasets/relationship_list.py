"""Convert the relationships between boxes of one image to entities and relations."""

import logging
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from ..dataset_dict import create_annotation

__all__ = ["AnnotatedEntity", "ImageAnnotations", "RelationshipList", "report_merging"]

logger = logging.getLogger(__name__)


class AnnotatedEntity(NamedTuple):
    """One end of a relationship; equal ones in the same image are the same entity."""

    category: int
    box: tuple[float, float, float, float]  # XYXY


class ImageAnnotations(NamedTuple):
    """Entities and relations of one image, as in a dataset dict."""

    annotations: list[dict[str, Any]]
    relations: list[tuple[int, int, int]]


class RelationshipList:
    """Collects the relationships of one image, each between two annotated entities.

    The entities are the distinct (category, box) in order of appearance. A few relationships have
    the same category and box at both ends ("person next to person" over one group). A relation of
    an entity to itself cannot be enumerated or evaluated as a pair, so their object becomes a
    second entity with that category and box: the same two boxes that published protocols score.
    """

    def __init__(self) -> None:
        self._entities: dict[tuple[AnnotatedEntity, int], int] = {}
        self._relations: dict[tuple[int, int, int], int] = {}
        self._attributes: dict[int, dict[int, None]] = {}
        self.duplicates: list[Hashable] = []
        self.reflexive: list[Hashable] = []

    def add(
        self, subject: AnnotatedEntity, object_: AnnotatedEntity, predicate: int, source: Hashable
    ) -> None:
        """Add a relationship.

        Args:
            subject: its subject.
            object_: its object.
            predicate: its predicate, 0-based.
            source: where it is in the file, for messages.
        """
        same = subject == object_
        if same:
            self.reflexive.append(source)
        triplet = (self._index(subject), self._index(object_, int(same)), predicate)
        count = self._relations.get(triplet, 0)
        if count:
            self.duplicates.append(source)
        self._relations[triplet] = count + 1

    def add_attribute(self, entity: AnnotatedEntity, attribute: int) -> None:
        """Give an entity an attribute, 0-based."""
        self._attributes.setdefault(self._index(entity), {})[attribute] = None

    @property
    def has_relations(self) -> bool:
        """Whether any relationship was added."""
        return bool(self._relations)

    def finish(
        self, merge_duplicates: bool, scale: Sequence[float] = (1.0, 1.0)
    ) -> ImageAnnotations:
        """Return the entities and relations.

        Args:
            merge_duplicates: keep only one copy of equal relationships.
            scale: factors for x and y, for boxes that are relative to the image size.
        """
        x_scale, y_scale = scale
        annotations = []
        for (entity, _), index in self._entities.items():
            x0, y0, x1, y1 = entity.box
            box = (x0 * x_scale, y0 * y_scale, x1 * x_scale, y1 * y_scale)
            annotation = create_annotation(box, entity.category)
            if index in self._attributes:
                annotation["attributes"] = sorted(self._attributes[index])
            annotations.append(annotation)
        relations = [
            triplet
            for triplet, count in self._relations.items()
            for _ in range(1 if merge_duplicates else count)
        ]
        return ImageAnnotations(annotations, relations)

    def _index(self, entity: AnnotatedEntity, copy: int = 0) -> int:
        return self._entities.setdefault((entity, copy), len(self._entities))


def report_merging(source: str, lists: Iterable[RelationshipList], merge_duplicates: bool) -> None:
    """Log how many relationships are duplicates, and how many have the same box at both ends.

    Args:
        source: the file.
        lists: the lists of all images.
        merge_duplicates: as passed to :meth:`RelationshipList.finish`.
    """
    lists = list(lists)
    duplicates = [place for x in lists for place in x.duplicates]
    reflexive = [place for x in lists for place in x.reflexive]
    if duplicates:
        done = "merged" if merge_duplicates else "kept"
        logger.warning(
            f"{source}: {len(duplicates)} relationships repeat an earlier one of their image "
            f"exactly and were {done}; the first: {duplicates[0]}."
        )
    if reflexive:
        logger.warning(
            f"{source}: {len(reflexive)} relationships have the same category and box at both "
            "ends; their object became a separate entity with this category and box. The first: "
            f"{reflexive[0]}."
        )
