"""An HTML gallery of predictions: one self-contained file.

Each image is a small picture with its ranked triplets. The page filters them by predicate, words
and hit or miss, sorts the images, and shows the boxes of the triplet under the pointer.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.matching import counted_relations, counted_triplets, match_relations
from ..structures.names import class_name, name_entities, with_attributes
from ..structures.scene_graph import RelationRow, SceneGraph
from ..utils.file_io import write_atomically
from ..utils.protocols import find_protocol
from .compare import rule_name
from .correspondence import same_entities
from .layout import predicate_color
from .visualizer import check_size

__all__ = ["gallery_record", "write_gallery"]

_TEMPLATE = Path(__file__).with_name("gallery.html")


def gallery_record(
    name: str,
    image: np.ndarray,
    predicted: SceneGraph,
    metadata: Any,
    dataset_dict: dict[str, Any] | None = None,
    topk: int = 20,
    side: int = 400,
    min_score: float = 0.0,
    protocol: str = "",
) -> dict[str, Any]:
    """Return one image of the gallery as plain types.

    Args:
        name: name of the image.
        image: (H, W, 3) uint8 in RGB order.
        predicted: prediction in the image's frame.
        metadata: with ``thing_classes`` and ``predicate_classes``; ``attribute_classes`` if there
            are attributes; ``evaluator_type`` if there is ground truth.
        dataset_dict: ground truth in the image's frame, for hits and misses.
        topk: max relations listed.
        side: longest side of the small picture in pixels.
        min_score: relations with a lower score are left out.
        protocol: evaluation protocol that counts the hits; empty means the dataset's own.

    Returns:
        name, width, height, ``picture`` (a data URL), ``boxes`` and ``names`` of the entities that
        take part, ``rows`` (subject, object, predicate, score, hit), ``missed`` (the first three
        of each ground-truth relation that is not found), ``truth`` and ``protocol`` (number of
        ground-truth relations and the protocol that counted, or None). An entity has one name in
        all rows.

    Raises:
        ValueError: as in :func:`.compare.compare_models`.
    """
    height, width = image.shape[:2]
    scene = predicted.best(topk, min_score)
    truth = SceneGraph.empty()
    hits: list[bool | None] = [None] * len(scene.pairs)
    missed: list[RelationRow] = []
    rules = None
    if dataset_dict is not None:
        rules = find_protocol(protocol, metadata.get("evaluator_type", None))
        check_size(image, dataset_dict)
        truth = counted_relations(SceneGraph.from_dataset_dict(dataset_dict), rules)
        k = rules.predicates_per_pair[0]
        scene = counted_triplets(predicted.best(None, min_score), truth, rules, k, topk)
        hits, found = (x.tolist() for x in match_relations(scene, truth, rules, k))
        missed = [row for row, is_found in zip(truth.rows(), found) if not is_found]
    # The page shows the predicted boxes and, of missed relations, the true ones.
    distinct, (same_as,) = same_entities(truth, [scene])
    related = scene.related_entities
    not_found = sorted({entity for row in missed for entity in row[:2]})
    named = sorted({*same_as.values(), *not_found})
    names = name_entities(distinct.boxes, distinct.classes, named, metadata.thing_classes)
    boxes = [*scene.boxes[related], *truth.boxes[not_found]]
    index_of = {entity: index for index, entity in enumerate(related)}
    index_of_missed = {entity: index for index, entity in enumerate(not_found, len(related))}

    attributes = metadata.get("attribute_classes", None) or ()
    words, true_words = (
        replace(x, attribute_classes=attributes).attribute_words() for x in (scene, truth)
    )

    def predicate(predicate_id: int) -> str:
        return class_name(predicate_id, metadata.predicate_classes, "predicate")

    return {
        "name": name,
        "width": width,
        "height": height,
        "picture": _data_url(image, side),
        "boxes": [[round(float(x), 1) for x in box] for box in boxes],
        "names": [with_attributes(names[same_as[i]], words[i]) for i in related]
        + [with_attributes(names[i], true_words[i]) for i in not_found],
        "rows": [
            [index_of[s], index_of[o], predicate(p), round(float(score), 4), hit]
            for (s, o, p, score), hit in zip(scene.rows(), hits)
        ],
        "missed": [[index_of_missed[s], index_of_missed[o], predicate(p)] for s, o, p, _ in missed],
        "truth": None if dataset_dict is None else len(truth.pairs),
        "protocol": rules and rule_name(rules),
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
    """Write the page atomically, one record at a time, so that any number fits in memory.

    Args:
        path: HTML file.
        records: from :func:`gallery_record`.
        title: title of the page.
        predicate_classes: names by id, for the colors of the predicates.

    Returns:
        the number of images.
    """
    before, after = _TEMPLATE.read_text(encoding="utf-8").split("/*RECORDS*/")
    colors = {
        name: "#" + "".join(f"{round(255 * x):02x}" for x in predicate_color(predicate))
        for predicate, name in enumerate(predicate_classes)
    }
    before = before.replace("{{TITLE}}", html.escape(title))
    before = before.replace('"{{COLORS}}"', _script_json(colors))
    count = 0
    with write_atomically(str(path)) as file:
        file.write(before)
        for record in records:
            file.write(_script_json(record) + ",\n")
            count += 1
        file.write(after)
    return count


def _script_json(value: Any) -> str:
    """Return JSON that is safe inside a script element, whatever names it has."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
