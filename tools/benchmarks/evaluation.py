"""Compute Visual Genome's metrics at the size of its test set, against a plain loop over images.

The data is generated: 26,446 images with 180,000 relations of 150 classes and 50 predicates, and
100 predicted triplets per image, some of which are right. The plain formulation of the same rule
(protocol ``motifs``) is that of tools/benchmarks/plain.py: image by image with numpy.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reldn_d2.evaluation import SceneGraphEvaluator
from reldn_d2.evaluation.batches import ImagePair
from reldn_d2.evaluation.predictions_io import read_predictions, write_predictions
from reldn_d2.evaluation.protocol_metrics import Settings, block_name
from reldn_d2.evaluation.scoring import score
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY

from detectron2.data import DatasetCatalog, MetadataCatalog

from .measure import print_table, resident_peak, time_once
from .plain import recalls_in_loops
from .synthetic import draw_dataset, long_tail

__all__ = ["add_arguments", "run"]

NAME = "benchmark_evaluation"
NUM_CLASSES, NUM_PREDICATES = 150, 50
RECALL_AT, KS = (20, 50, 100), (1, None)  # n of R@n; predicates per pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.set_defaults(threads=1)
    parser.add_argument("--images", type=int, default=26446)
    parser.add_argument("--relations", type=int, default=180000, help="of all images together")
    parser.add_argument("--triplets", type=int, default=100, help="predicted per image")
    parser.add_argument(
        "--plain-images", type=int, default=2000, help="images of the plain loop; 0: all"
    )


def draw_predictions(dicts: Sequence[dict[str, Any]], num_triplets: int) -> Iterator[SceneGraph]:
    """Draw detections near the annotations and others; triplets that are right and others."""
    rng = np.random.default_rng(1)
    for record in dicts:
        boxes = np.array([a["bbox"] for a in record["annotations"]])
        classes = np.array([a["category_id"] for a in record["annotations"]])
        source = np.concatenate([np.arange(len(boxes)), rng.integers(0, len(boxes), 50)])
        count = len(source)
        noise = rng.normal(0, 6, (count, 2, 2))
        detected = np.sort(boxes[source].reshape(-1, 2, 2) + noise, axis=1).reshape(-1, 4)
        is_wrong = rng.random(count) < 0.2
        labels = np.where(is_wrong, long_tail(rng, NUM_CLASSES, count), classes[source])
        subjects = rng.integers(0, count, num_triplets)
        pairs = np.stack([subjects, (subjects + rng.integers(1, count, num_triplets)) % count], 1)
        predicates = long_tail(rng, NUM_PREDICATES, num_triplets)
        hits = rng.permutation(num_triplets)[: len(record["relations"])]
        truth = np.array(record["relations"], dtype=np.int64).reshape(-1, 3)[: len(hits)]
        pairs[hits], predicates[hits] = truth[:, :2], truth[:, 2]
        again = hits[: num_triplets - 1]  # a second predicate of the same pair
        pairs[(again + 1) % num_triplets] = pairs[again]
        box_scores, scores = rng.random(count), rng.random(num_triplets)
        # A prediction lists no triplet twice.
        drawn = np.column_stack([pairs, predicates])
        once = np.sort(np.unique(drawn, axis=0, return_index=True)[1])
        yield SceneGraph.from_arrays(
            record["image_id"],
            detected,
            labels,
            box_scores,
            pairs[once],
            predicates[once],
            scores[once],
        )


def motifs_metrics(
    images: Sequence[ImagePair], settings: Settings
) -> dict[int | None, dict[str, float]]:
    """Score by the protocol ``motifs``; metrics for each k."""
    results = score(images, PROTOCOL_REGISTRY["motifs"], settings).results
    return {k: results[block_name("motifs", settings.task, k)] for k in KS}


def run(args: argparse.Namespace) -> None:
    """Evaluate, then run the plain loop.

    Raises:
        AssertionError: their metrics differ.
    """
    dicts = draw_dataset(args.images, args.relations, NUM_CLASSES, NUM_PREDICATES)
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).set(
        thing_classes=[f"class {c}" for c in range(NUM_CLASSES)],
        predicate_classes=[f"predicate {p}" for p in range(NUM_PREDICATES)],
        evaluator_type="scene_graph",
    )
    labels = {
        (record["annotations"][s]["category_id"], p, record["annotations"][o]["category_id"])
        for record in dicts
        for s, o, p in record["relations"]
    }
    seen = np.array(sorted(labels))[::2]  # as if the training set had half of the triplets
    rows = []

    def timed(name: str, function, *arguments: Any) -> tuple[Any, float]:
        result, seconds = time_once(function, *arguments)
        rows.append([name, f"{seconds.wall:.1f} s", f"{resident_peak() / 2**30:.2f} GiB"])
        return result, seconds.wall

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/relation_predictions.json"
        drawn = draw_predictions(dicts, args.triplets)
        timed("generate and write the file", write_predictions, drawn, file)
        evaluator = SceneGraphEvaluator(NAME, folder, seen_triplets=seen, keep_predictions=False)

        def read() -> None:
            for prediction in read_predictions(file, NUM_CLASSES, NUM_PREDICATES):
                evaluator.add(prediction)

        timed("read the file (not needed when a model is evaluated)", read)
        timed("convert annotations to arrays", lambda: evaluator.ground_truth)
        results, _ = timed("R, mR, zR, AP, confusions, tables, plots", evaluator.evaluate)
        images = evaluator.joined()
    names = evaluator.settings.predicate_names
    settings = Settings(names, "sgdet", KS, RECALL_AT, 100, seen_triplets=seen)
    metrics, seconds = timed("R, mR, zR, AP, confusions alone", motifs_metrics, images, settings)
    part = images[: args.plain_images or len(images)]
    plain, spent = time_once(recalls_in_loops, part, seen, KS, RECALL_AT)
    plain_seconds = spent.wall * len(images) / len(part)
    scaled = "" if len(part) == len(images) else ", scaled"
    rows.append([f"R, mR and zR in a loop ({len(part)} images{scaled})", f"{plain_seconds:.0f} s"])
    same = motifs_metrics(part, settings)
    for (k, name), value in plain.items():
        if not np.isclose(same[k][name], value, rtol=1e-9):
            raise AssertionError(f"{name}, k={k}: {same[k][name]} and {value} in the plain loop")
    assert results["motifs_sgdet_no_constraint"]["R@50"] == metrics[None]["R@50"]
    title = f"{len(images)} images, {args.relations} relations, {args.triplets} triplets per image"
    print_table(rows, ["", "time", "peak memory so far"], title)
    print(f"\nThe loop takes {plain_seconds / seconds:.0f} times as long, with equal results.")
    columns = [f"{kind}@{n}" for kind in ("R", "mR", "zR") for n in RECALL_AT]
    table = [[k or "all", *(f"{metrics[k][name]:.2f}" for name in columns)] for k in KS]
    print_table(table, ["predicates per pair", *columns])
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
