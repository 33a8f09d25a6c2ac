"""Pictures of the demo: ground truth and both models' best triplets, from their predictions."""

from pathlib import Path
from typing import Any

import numpy as np
from draw_relations import Loaded, load_predictions
from PIL import Image

from reldn_d2.evaluation.matching import find_hits
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.vis.compare import compare_models

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image

__all__ = ["draw_pictures"]

DATASET = "toy_vrd_test"
TASK = "prdcls"


def count_found(dataset_dict: dict[str, Any], predicted: SceneGraph) -> int:
    """How many true relations are among as many best triplets."""
    truth = SceneGraph.from_dataset_dict(dataset_dict)
    return sum(find_hits(predicted.best(len(truth.pairs)), truth)[1])


def draw_pictures(folders: dict[str, Path], output: Path, number: int) -> list[Path]:
    """Draw the test images in which two models differ most, in both directions.

    Two thirds are images where the second model finds more than the first, one third images where
    it finds less, if there are such.

    Args:
        folders: two models' output folders by name.
        output: folder for the pictures; PNG files that are in it go.
        number: how many.

    Returns:
        The files.
    """
    records = DatasetCatalog.get(DATASET)
    dicts = {x["image_id"]: x for x in records}
    metadata = MetadataCatalog.get(DATASET)
    models = {}
    for name, folder in folders.items():
        file = folder / "inference" / TASK / "relation_predictions.json"
        models[name] = Loaded(records, metadata, load_predictions(file, records, metadata))
    first, second = models.values()
    gains = {
        image_id: count_found(x, second.predicted(x)) - count_found(x, first.predicted(x))
        for image_id, x in dicts.items()
    }
    order = sorted(gains, key=lambda image_id: gains[image_id])
    worse = [x for x in order[: number // 3] if gains[x] < 0]
    chosen = order[::-1][: number - len(worse)] + worse

    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.png"):
        old.unlink()
    files = []
    for rank, image_id in enumerate(chosen):
        image = read_image(dicts[image_id]["file_name"], format="RGB")
        row = compare_models(
            np.ascontiguousarray(image),
            dicts[image_id],
            {name: model.predicted(dicts[image_id]) for name, model in models.items()},
            metadata,
        )
        path = output / f"{rank + 1}_image_{Path(dicts[image_id]['file_name']).stem}.png"
        Image.fromarray(row).save(path)
        files.append(path)
    return files
