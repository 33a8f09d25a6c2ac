"""Pictures of the demo: ground truth and both models' best triplets, from their predictions."""

import json
from pathlib import Path
from typing import Any, Dict, List

import reldn_d2  # noqa: F401  # isort: skip  registers the data sets
import numpy as np
import torch
from PIL import Image

from reldn_d2.structures.relations import predicted_relations
from reldn_d2.visualizer import Scene, compare_models, find_hits

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances

__all__ = ["draw_pictures"]

DATASET = "toy_vrd_test"
TASK = "prdcls"


def outputs_of(record: Dict[str, Any], height: int, width: int) -> Dict[str, Instances]:
    """The model's output for one image, from its record in ``relation_predictions.json``."""
    instances = Instances((height, width))
    entities, related = record["instances"], record["relations"]
    instances.pred_boxes = Boxes(torch.tensor(entities["boxes"]).reshape(-1, 4))
    instances.scores = torch.tensor(entities["scores"])
    instances.pred_classes = torch.tensor(entities["classes"], dtype=torch.int64)
    scores = torch.tensor(related["scores"])
    relations = predicted_relations(
        (height, width),
        torch.tensor(related["pairs"], dtype=torch.int64).reshape(-1, 2),
        torch.tensor(related["predicates"], dtype=torch.int64),
        scores,
        scores,  # with given boxes and classes a triplet's score is the predicate's
    )
    return {"instances": instances, "relations": relations}


def count_found(dataset_dict: Dict[str, Any], outputs: Dict[str, Instances]) -> int:
    """How many true relations are among as many best triplets."""
    truth = Scene.from_dataset_dict(dataset_dict)
    best = Scene.from_outputs(outputs["instances"], outputs["relations"], len(truth.triplets))
    return sum(find_hits(best, truth)[1])


def draw_pictures(folders: Dict[str, Path], output: Path, number: int) -> List[Path]:
    """Draw test images: most of them where the second model finds more than the first, and a
    third where it finds less, if there are such.

    Args:
        folders: two models' output folders by name.
        output: folder for the pictures.
        number: how many.

    Returns:
        The files.
    """
    dicts = {x["image_id"]: x for x in DatasetCatalog.get(DATASET)}
    predictions: Dict[str, Dict[Any, Dict[str, Instances]]] = {}
    for name, folder in folders.items():
        records = json.loads(
            (folder / "inference" / TASK / "relation_predictions.json").read_text()
        )
        predictions[name] = {
            x["image_id"]: outputs_of(
                x, dicts[x["image_id"]]["height"], dicts[x["image_id"]]["width"]
            )
            for x in records
        }
    first, second = predictions.values()
    gains = {
        image_id: count_found(x, second[image_id]) - count_found(x, first[image_id])
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
            {name: found[image_id] for name, found in predictions.items()},
            MetadataCatalog.get(DATASET),
        )
        path = output / f"{rank + 1}_image_{Path(dicts[image_id]['file_name']).stem}.png"
        Image.fromarray(row).save(path)
        files.append(path)
    return files
