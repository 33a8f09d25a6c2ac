"""Visual Genome's metrics at the size of its test set, beside a plain loop over images.

The data is generated: 26,446 images with 180,000 relations of 150 classes and 50 predicates, and
100 predicted triplets an image, some of which are right. The plain formulation of the same rule
(protocol ``motifs``) takes image by image with numpy, as papers' code does.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reldn_d2.evaluation import SceneGraphEvaluator
from reldn_d2.evaluation.batches import ImagePair
from reldn_d2.evaluation.predictions_io import read_predictions, write_predictions
from reldn_d2.evaluation.protocol_metrics import Settings, block_name
from reldn_d2.evaluation.scoring import score
from reldn_d2.structures.boxes_np import pairwise_iou
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.protocols import PROTOCOLS

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .measure import describe, print_table

NAME = "benchmark_of_visual_genomes_size"
NUM_CLASSES, NUM_PREDICATES = 150, 50
RECALL_AT, KS = (20, 50, 100), (1, None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--images", type=int, default=26446)
    parser.add_argument("--relations", type=int, default=180000, help="of all images together")
    parser.add_argument("--triplets", type=int, default=100, help="predicted, an image")
    parser.add_argument(
        "--plain-images", type=int, default=2000, help="images of the plain loop; 0: all"
    )


def skewed(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Numbers below ``count`` with the long tail of real labels."""
    weights = 1.0 / np.arange(1, count + 1)
    return rng.choice(count, size, p=weights / weights.sum())


def dataset_dicts(num_images: int, num_relations: int) -> list[dict[str, Any]]:
    """Dicts in the data sets' format; the relations are spread at random over the images."""
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(0, num_images, num_relations))
    counts = np.bincount(owner, minlength=num_images)
    dicts = []
    for image in range(num_images):
        size = int(rng.integers(4, 24))
        low = rng.uniform(0, 400, (size, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 300, (size, 2))], axis=1).tolist()
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, "iscrowd": 0}
            for box, c in zip(boxes, skewed(rng, NUM_CLASSES, size).tolist())
        ]
        subjects = rng.integers(0, size, counts[image])
        objects = (subjects + rng.integers(1, size, counts[image])) % size
        predicates = skewed(rng, NUM_PREDICATES, counts[image])
        relations = list(zip(subjects.tolist(), objects.tolist(), predicates.tolist()))
        dicts.append({"image_id": image, "annotations": annotations, "relations": relations})
    return dicts


def predictions(dicts: Sequence[dict[str, Any]], triplets: int) -> Iterator[SceneGraph]:
    """Detections near the annotations and others; triplets that are right and others."""
    rng = np.random.default_rng(1)
    for record in dicts:
        boxes = np.array([a["bbox"] for a in record["annotations"]])
        classes = np.array([a["category_id"] for a in record["annotations"]])
        size = len(boxes)
        source = np.concatenate([np.arange(size), rng.integers(0, size, 50)])
        found = np.sort(boxes[source].reshape(-1, 2, 2) + rng.normal(0, 6, (size + 50, 2, 2)), 1)
        wrong = rng.random(len(source)) < 0.2
        labels = np.where(wrong, skewed(rng, NUM_CLASSES, len(source)), classes[source])
        pairs = rng.integers(0, len(source), (triplets, 2))
        pairs[:, 1] = np.where(pairs[:, 0] == pairs[:, 1], pairs[:, 0] - 1, pairs[:, 1])
        pairs[pairs < 0] = len(source) - 1
        predicates = skewed(rng, NUM_PREDICATES, triplets)
        true = np.array(record["relations"], dtype=np.int64).reshape(-1, 3)
        hits = rng.permutation(triplets)[: len(true)]
        true = true[: len(hits)]
        pairs[hits], predicates[hits] = true[:, :2], true[:, 2]
        scores = rng.random(triplets)
        again = hits[: triplets - 1]  # a second predicate of the same pair
        pairs[(again + 1) % triplets] = pairs[again]
        yield SceneGraph.from_arrays(
            record["image_id"],
            found.reshape(-1, 4),
            labels,
            rng.random(len(source)),
            pairs,
            predicates,
            scores,
        )


def motifs_metrics(
    images: Sequence[ImagePair], settings: Settings
) -> dict[int | None, dict[str, float]]:
    """Score by the protocol ``motifs``; metrics for each k."""
    results = score(images, PROTOCOLS["motifs"], settings).results
    return {k: results[block_name("motifs", settings.task, k)] for k in KS}


def plain_metrics(images: Sequence[ImagePair], seen: np.ndarray) -> dict[tuple[int, str], float]:
    """R@n, mR@n and zR@n with and without graph constraint, image by image."""
    known = {tuple(x) for x in seen.tolist()}
    recalls: dict[tuple, list] = {}
    for truth, prediction in images:
        if len(truth.relations) == 0:
            continue
        gt_labels, gt_pairs = truth.labels, truth.pairs
        unseen = [i for i, x in enumerate(gt_labels.tolist()) if tuple(x) not in known]
        for k in KS:
            kept, times = [], {}
            for i, pair in enumerate(map(tuple, prediction.pairs.tolist())):
                times[pair] = times.get(pair, 0) + 1
                if k is None or times[pair] <= k:
                    kept.append(i)
            best = prediction.select(np.array(kept, dtype=np.int64)[: max(RECALL_AT)])
            equal = (gt_labels[:, None] == best.labels[None]).all(-1)
            finds: list[list[int]] = [[] for _ in best.scores]
            for g in np.flatnonzero(equal.any(1)):
                rows = np.flatnonzero(equal[g])
                sides = [
                    pairwise_iou(
                        truth.boxes[gt_pairs[g, side]][None], best.boxes[best.pairs[rows, side]]
                    )[0]
                    for side in (0, 1)
                ]
                for row in rows[(sides[0] >= 0.5) & (sides[1] >= 0.5)]:
                    finds[row].append(int(g))
            for n in RECALL_AT:
                found = set().union(*finds[:n]) if finds else set()
                recalls.setdefault((k, "R", n), []).append(len(found) / len(gt_labels))
                for p in set(gt_labels[:, 1].tolist()):
                    own = np.flatnonzero(gt_labels[:, 1] == p).tolist()
                    share = len(found.intersection(own)) / len(own)
                    recalls.setdefault((k, "mR", n, p), []).append(share)
                if unseen:
                    share = len(found.intersection(unseen)) / len(unseen)
                    recalls.setdefault((k, "zR", n), []).append(share)
    means = {key: 100 * float(np.mean(values)) for key, values in recalls.items()}
    result = {(key[0], f"{key[1]}@{key[2]}"): means[key] for key in means if len(key) == 3}
    for k in KS:
        for n in RECALL_AT:
            of_predicates = [v for key, v in means.items() if key[:3] == (k, "mR", n)]
            result[k, f"mR@{n}"] = float(np.mean(of_predicates))
    return result


def largest_memory() -> str:
    """The process's largest resident set so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def run(args: argparse.Namespace) -> None:
    """Evaluate, then the plain loop; they have to agree."""
    logging.getLogger("reldn_d2").setLevel(logging.ERROR)
    dicts = dataset_dicts(args.images, args.relations)
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).set(
        thing_classes=[f"class {c}" for c in range(NUM_CLASSES)],
        predicate_classes=[f"predicate {p}" for p in range(NUM_PREDICATES)],
        evaluator_type="scene_graph",
    )
    seen = _some_triplets(dicts)
    rows = []

    def timed(name: str, function, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        rows.append([name, f"{time.perf_counter() - started:.1f} s", largest_memory()])
        return result

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/relation_predictions.json"
        timed(
            "generate, write the file", write_predictions, predictions(dicts, args.triplets), file
        )
        evaluator = SceneGraphEvaluator(NAME, folder, seen_triplets=seen, keep_predictions=False)

        def read() -> None:
            for prediction in read_predictions(file, NUM_CLASSES, NUM_PREDICATES):
                evaluator.add(prediction)

        timed("read the file (not needed in a model's evaluation)", read)
        timed("annotations as arrays", lambda: evaluator.ground_truth)
        results = timed("evaluate: R, mR, zR, AP, confusions, tables, plots", evaluator.evaluate)
        images = evaluator.joined()
    settings = Settings(
        evaluator.settings.predicate_names, "sgdet", KS, RECALL_AT, 100, seen_triplets=seen
    )
    fast = timed("of which R, mR, zR, AP, confusions", motifs_metrics, images, settings)
    seconds = float(rows[-1][1].split()[0])
    part = images[: args.plain_images or len(images)]
    started = time.perf_counter()
    plain = plain_metrics(part, seen)
    plain_seconds = (time.perf_counter() - started) * len(images) / len(part)
    scaled = "" if len(part) == len(images) else ", scaled"
    rows.append([f"R, mR and zR in a loop ({len(part)} images{scaled})", f"{plain_seconds:.0f} s"])
    same = motifs_metrics(part, settings)
    for (k, name), value in plain.items():
        if not np.isclose(same[k][name], value, rtol=1e-9):
            raise AssertionError(f"{name}, k={k}: {same[k][name]} and {value} in the plain loop")
    title = (
        f"{len(images)} images, {args.relations} relations, {args.triplets} triplets an image; "
        + describe("cpu", 1)
    )
    print_table(rows, ["", "time", "largest memory so far"], title)
    print(f"\nThe loop takes {plain_seconds / seconds:.0f} times as long, with equal results.")
    names = [f"{kind}@{n}" for kind in ("R", "mR", "zR") for n in RECALL_AT]
    table = [[k or "all", *(f"{fast[k][name]:.2f}" for name in names)] for k in KS]
    print_table(table, ["predicates a pair", *names])
    assert results["motifs_sgdet_no_constraint"]["R@50"] == fast[None]["R@50"]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def _some_triplets(dicts: Sequence[dict[str, Any]]) -> np.ndarray:
    """Half of the distinct triplets, as if the training set had them."""
    labels = {
        (r["annotations"][s]["category_id"], p, r["annotations"][o]["category_id"])
        for r in dicts
        for s, o, p in r["relations"]
    }
    return np.array(sorted(labels), dtype=np.int64).reshape(-1, 3)[::2]
