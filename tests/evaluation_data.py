"""A small dataset for tests of the evaluators, and a model's output for it."""

from contextlib import contextmanager

import torch

from reldn_d2.structures.relations import predicted_relations

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

NAME = "evaluation_test_set"
CLASSES, PREDICATES = ["person", "cup"], ["holds", "next to", "wears"]


def annotation(x, y, width, height, category):
    return {
        "bbox": [x, y, width, height],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "iscrowd": 0,
    }


def dataset_dicts():
    """Two persons and three cups; an image without relations; one without annotations."""
    people = [annotation(0, 0, 20, 40, 0), annotation(30, 0, 20, 40, 0)]
    cups = [annotation(22 + 3 * i, 10, 5.5, 5, 1) for i in range(3)]
    images = [
        {"annotations": people + cups, "relations": [(0, 2, 0), (1, 3, 0), (0, 1, 1)]},
        {"annotations": people, "relations": []},
        {"annotations": [], "relations": []},
    ]
    for name, image in zip("abc", images):
        image.update(image_id=f"{name}_1.jpg", file_name=f"/x/{name}_1.jpg", height=60, width=80)
    return images


@contextmanager
def registered(records=dataset_dicts, **metadata):
    """The dataset above, registered under :data:`NAME`; gives its metadata."""
    DatasetCatalog.register(NAME, records)
    known = dict(thing_classes=CLASSES, predicate_classes=PREDICATES, evaluator_type="relation")
    try:
        yield MetadataCatalog.get(NAME).set(**{**known, **metadata})
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def output(record, triplets, score=0.9):
    """A model's output with the ground truth's boxes; triplets are (subject, object, predicate)."""
    size = (record["height"], record["width"])
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]
    ]
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]]).long()
    instances.scores = torch.ones(len(boxes))
    table = torch.tensor(triplets).long().reshape(-1, 3)
    scores = score - 0.1 * torch.arange(len(table))
    relations = predicted_relations(size, table[:, :2], table[:, 2], scores, scores)
    return {"instances": instances, "relations": relations}


def run(evaluator, make_triplets=lambda record: record["relations"], only=None):
    evaluator.reset()
    for record in dataset_dicts():
        if only is None or record["image_id"] in only:
            inputs = {"image_id": record["image_id"]}
            evaluator.process([inputs], [output(record, make_triplets(record))])
    return evaluator.evaluate()
