#!/usr/bin/env python
r"""Draw images of a registered data set with their true relations, beside predictions if given.

Example::

    python tools/draw_relations.py --dataset vrd_test --output output/vrd/pictures --number 10 \
        --predictions output/vrd/reldn_small/inference/prdcls/relation_predictions.json
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the data sets
import numpy as np
import torch
from PIL import Image

from reldn_d2.structures.relations import predicted_relations
from reldn_d2.visualizer import RelationVisualizer
from reldn_d2.visualizer_compare import compare_image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances

__all__ = ["check_dataset", "outputs_of", "read_predictions"]


def outputs_of(record: Dict[str, Any], height: int, width: int) -> Dict[str, Instances]:
    """The model's output for one image, from its record in ``relation_predictions.json``."""
    instances = Instances((height, width))
    entities, related = record["instances"], record["relations"]
    instances.pred_boxes = Boxes(torch.tensor(entities["boxes"]).reshape(-1, 4))
    instances.scores = torch.tensor(entities["scores"])
    instances.pred_classes = torch.tensor(entities["classes"], dtype=torch.int64)
    pairs = torch.tensor(related["pairs"], dtype=torch.int64).reshape(-1, 2)
    scores = torch.tensor(related["scores"])
    of_entities = instances.scores[pairs].prod(dim=1)
    relations = predicted_relations(
        (height, width),
        pairs,
        torch.tensor(related["predicates"], dtype=torch.int64),
        scores,
        scores / of_entities.clamp(min=1e-12),
    )
    best_first = scores.argsort(descending=True, stable=True)
    return {"instances": instances, "relations": relations[best_first]}


def read_predictions(path: Path, dicts: List[Dict[str, Any]]) -> Dict[Any, Dict[str, Instances]]:
    """Outputs by image id, for the images of a data set."""
    sizes = {x["image_id"]: (x["height"], x["width"]) for x in dicts}
    records = json.loads(Path(path).read_text())
    return {x["image_id"]: outputs_of(x, *sizes[x["image_id"]]) for x in records}


def check_dataset(
    parser: argparse.ArgumentParser, dataset: str, predictions: Optional[Path]
) -> None:
    """Stop with a message if the data set is not registered or the predictions are not there."""
    if dataset not in DatasetCatalog.list():
        near = difflib.get_close_matches(dataset, DatasetCatalog.list(), n=3)
        parser.error(f"no data set '{dataset}' is registered; near it: {', '.join(near)}")
    if predictions and not predictions.is_file():
        parser.error(f"no file '{predictions}'; evaluating writes it under OUTPUT_DIR/inference")


def main(arguments: Optional[List[str]] = None) -> int:
    """Draw; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--predictions", type=Path, help="relation_predictions.json of this set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--number", type=int, default=10, help="images, from the first on")
    parser.add_argument("--top-k", type=int, help="predictions drawn; default: as many as are true")
    args = parser.parse_args(arguments)
    check_dataset(parser, args.dataset, args.predictions)

    dicts, metadata = DatasetCatalog.get(args.dataset), MetadataCatalog.get(args.dataset)
    predictions = read_predictions(args.predictions, dicts) if args.predictions else {}
    args.output.mkdir(parents=True, exist_ok=True)
    for record in dicts[: args.number]:
        image = np.ascontiguousarray(read_image(record["file_name"], format="RGB"))
        outputs = predictions.get(record["image_id"])
        if outputs is None:
            picture = RelationVisualizer(image, metadata).draw_ground_truth(record).get_image()
        else:
            picture = compare_image(image, record, outputs, metadata, args.top_k)
        path = args.output / f"{Path(record['file_name']).stem}.png"
        Image.fromarray(picture).save(path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
