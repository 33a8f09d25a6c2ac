"""An HTML gallery of predictions: one file that needs nothing beside itself.

Each image is a small picture with its ranked triplets; the page filters them by predicate, words
and hit or miss, sorts the images, and shows the boxes of the triplet pointed at.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.matching import find_hits
from ..structures.names import class_name, name_entities
from ..structures.scene_graph import RelationRow, SceneGraph
from .layout import predicate_color
from .scene import same_entities
from .visualizer import check_size

__all__ = ["gallery_record", "write_gallery"]

_TEMPLATE = Path(__file__).with_name("gallery.html")


def gallery_record(
    name: str,
    image: np.ndarray,
    predicted: SceneGraph,
    thing_classes: Sequence[str],
    predicate_classes: Sequence[str],
    dataset_dict: dict[str, Any] | None = None,
    topk: int = 20,
    side: int = 400,
    min_score: float = 0.0,
) -> dict[str, Any]:
    """One image of the gallery, as plain types.

    Args:
        name: of the image.
        image: (H, W, 3) uint8 in RGB order.
        predicted: in the image's frame.
        thing_classes, predicate_classes: names by id.
        dataset_dict: ground truth in the image's frame, for hits and misses.
        topk: at most so many relations.
        side: longest side of the small picture in pixels.
        min_score: relations below it are left out.

    Returns:
        name, width, height, ``picture`` (a data URL), ``boxes`` of the entities that take part,
        ``rows`` (subject, object, predicate, score, hit), ``missed`` (the same of ground truth
        that no row hits), ``names`` and ``truth`` (number of true relations or None).
        An entity has one name in all rows.

    Raises:
        ValueError: the image is not of the size that ``dataset_dict`` says.
    """
    height, width = image.shape[:2]
    scene = predicted.best(topk, min_score)
    truth = SceneGraph.empty()
    hits: list[bool | None] = [None] * len(scene.pairs)
    missed: list[RelationRow] = []
    if dataset_dict is not None:
        check_size(image, dataset_dict)
        truth = SceneGraph.from_dataset_dict(dataset_dict)
        hits, found = find_hits(scene, truth)
        missed = [row for row, is_found in zip(truth.rows(), found) if not is_found]
    # Predicted boxes and those of missed relations are shown each; an entity has one name in both.
    everything, (same,) = same_entities(truth, [scene])
    not_found = sorted({entity for row in missed for entity in row[:2]})
    used = sorted({*same.values(), *not_found})
    names = name_entities(everything.boxes, everything.classes, used, thing_classes)
    boxes = [*scene.boxes[scene.related_entities], *truth.boxes[not_found]]
    place = {entity: n for n, entity in enumerate(scene.related_entities)}
    place_missed = {entity: n for n, entity in enumerate(not_found, start=len(place))}

    def predicate(index: int) -> str:
        return class_name(index, predicate_classes, "predicate")

    return {
        "name": name,
        "width": width,
        "height": height,
        "picture": _data_url(image, side),
        "boxes": [[round(float(x), 1) for x in box] for box in boxes],
        "names": [names[same[i]] for i in scene.related_entities] + [names[i] for i in not_found],
        "rows": [
            [place[s], place[o], predicate(p), round(float(score), 4), hit]
            for (s, o, p, score), hit in zip(scene.rows(), hits)
        ],
        "missed": [[place_missed[s], place_missed[o], predicate(p)] for s, o, p, _ in missed],
        "truth": None if dataset_dict is None else len(truth.pairs),
    }


def _data_url(image: np.ndarray, side: int) -> str:
    picture = Image.fromarray(image)
    scale = min(1.0, side / max(picture.size))
    size = tuple(max(1, round(x * scale)) for x in picture.size)
    buffer = io.BytesIO()
    picture.resize(size, Image.LANCZOS).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_gallery(
    path: str | Path,
    records: Iterable[dict[str, Any]],
    title: str,
    predicate_classes: Sequence[str] = (),
) -> int:
    """Write the page; records are taken one at a time, so that any number fits in memory.

    Args:
        path: the HTML file.
        records: from :func:`gallery_record`.
        title: of the page.
        predicate_classes: for the colours of the predicates.

    Returns:
        the number of images.
    """
    before, after = _TEMPLATE.read_text(encoding="utf-8").split("/*RECORDS*/")
    colors = {
        name: "#" + "".join(f"{round(255 * x):02x}" for x in predicate_color(number))
        for number, name in enumerate(predicate_classes)
    }
    before = before.replace("{{TITLE}}", html.escape(title))
    before = before.replace('"{{COLORS}}"', _script_json(colors))
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write(before)
        for record in records:
            file.write(_script_json(record) + ",\n")
            count += 1
        file.write(after)
    return count


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element, whatever names are in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
