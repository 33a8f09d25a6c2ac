"""A dataset's annotations as predictions in the files of other programs, with random others."""

import pickle
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from reldn_d2.structures.scene_graph import SceneGraph

_MODULE = "maskrcnn_benchmark.structures.bounding_box"


@contextmanager
def box_list_class():
    """Yield ``BoxList``, importable under its own name as long as the block runs."""
    names = [_MODULE.rsplit(".", i)[0] for i in (2, 1)] + [_MODULE]
    for name in names:
        sys.modules[name] = ModuleType(name)
    cls = type("BoxList", (), {"__module__": _MODULE})
    sys.modules[_MODULE].BoxList = cls
    try:
        yield cls
    finally:
        for name in names:
            del sys.modules[name]


def raw_predictions(dicts, num_predicates, seed=0):
    """Per image: boxes, 1-based classes, scores, pairs, scores with the background first."""
    rng = np.random.default_rng(seed)
    images = []
    for record in dicts:
        truth = SceneGraph.from_dataset_dict(record)
        count = len(truth.boxes)
        pairs = np.array([(s, o) for s in range(count) for o in range(count) if s != o])
        pairs = pairs.astype(np.int64).reshape(-1, 2)
        scores = rng.uniform(0, 0.1, (len(pairs), num_predicates + 1))
        scores[:, 0] = 0.9
        for (s, o), predicate in zip(truth.pairs.tolist(), truth.predicates.tolist()):
            row = int(np.flatnonzero((pairs == (s, o)).all(axis=1))[0])
            scores[row, predicate + 1] = rng.uniform(0.5, 1)
        images.append((truth.boxes, truth.classes + 1, rng.uniform(0.5, 1, count), pairs, scores))
    return images


def write_tang(file: Path, images, dicts, scale=1.0, legacy=False, change=None) -> Path:
    """``eval_results.pytorch``; boxes in images ``scale`` times as large."""
    with box_list_class() as cls:
        predictions, truths = [], []
        for (boxes, classes, box_scores, pairs, scores), record in zip(images, dicts):
            size = (round(record["width"] * scale), round(record["height"] * scale))
            prediction, truth = cls(), cls()
            for x in (prediction, truth):
                x.bbox = torch.from_numpy(boxes * scale).float()
                x.size, x.mode, x.extra_fields, x.triplet_extra_fields = size, "xyxy", {}, []
            prediction.extra_fields = {
                "pred_labels": torch.from_numpy(classes),
                "pred_scores": torch.from_numpy(box_scores),
                "rel_pair_idxs": torch.from_numpy(pairs),
                "pred_rel_scores": torch.from_numpy(scores),
                "pred_rel_labels": torch.from_numpy(scores[:, 1:].argmax(1) + 1),
            }
            predictions.append(prediction)
            truths.append(truth)
        content = {"groundtruths": truths, "predictions": predictions}
        if change is not None:
            content = change(content) or content
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file


def motifs_records(images, dicts, long_side=1024):
    return [
        {
            "pred_boxes": boxes * (long_side / max(record["width"], record["height"])),
            "pred_classes": classes,
            "obj_scores": box_scores,
            "pred_rel_inds": pairs,
            "rel_scores": scores,
        }
        for (boxes, classes, box_scores, pairs, scores), record in zip(images, dicts)
    ]


def released_records(images, dicts, first_class_id=1, names=True):
    records = []
    for (boxes, classes, box_scores, pairs, scores), record in zip(images, dicts):
        fields = {"prd_scores": scores}
        for role, ends in (("sbj", pairs[:, 0]), ("obj", pairs[:, 1])):
            fields[f"{role}_boxes"] = boxes[ends].astype(np.float32)
            fields[f"{role}_labels"] = (classes[ends] - 1 + first_class_id).astype(np.int32)
            fields[f"{role}_scores"] = box_scores[ends]
        if names:
            fields["image"] = f"/data/{record['file_name'].rsplit('/', 1)[-1]}"
        records.append(fields)
    return records


def write_pickle(file: Path, content) -> Path:
    file.write_bytes(pickle.dumps(content, protocol=4))
    return file
