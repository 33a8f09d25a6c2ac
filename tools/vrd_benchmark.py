#!/usr/bin/env python
"""Train and score box models on VRD's annotations: no images, no GPU, minutes on a laptop.

Without arguments it makes the table of docs/benchmarks.md: each model is trained with each seed
and scored on the detections of VRD's test set that Lu et al. published. ``--losses`` compares the
losses instead, on images of the training set that are held out.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # if the package is not installed
CONFIG = PROJECT / "configs" / "VRD" / "reldn_boxes.yaml"
HELD_OUT, NUM_HELD_OUT = ("vrd_train_rest", "vrd_train_held_out"), 500

HEAD = "MODEL.ROI_RELATION_HEAD"
MODULES = ("SEMANTIC", "SPATIAL", "JOINT")
L0 = [x for i in (1, 2, 3) for x in (f"{HEAD}.LOSS.LAMBDA_{i}", 0.0)]
FOUR = [x for i, y in ((1, 1.0), (2, 0.5), (3, 0.1)) for x in (f"{HEAD}.LOSS.LAMBDA_{i}", y)]
# The optimizer and L0 of all rows but the last, whose settings were chosen on held-out images.
PLAIN = ["SOLVER.BASE_LR", 0.008, "SOLVER.WEIGHT_DECAY", 0.0001, f"{HEAD}.LOSS.L0_MEAN", "images"]
PLAIN += ["SOLVER.WEIGHT_DECAY_BIAS", None]


def modules(*names: str) -> list[Any]:
    """Return the options that switch on these modules alone."""
    return [x for name in MODULES for x in (f"{HEAD}.{name}.ENABLED", name in names)]


class Model(NamedTuple):
    """A row of the table."""

    name: str
    options: list[Any]
    trained: bool = True  # the frequency baselines are counted, not trained


def sampling(pairs: int) -> list[Any]:
    """Return the options for max pairs per image, half of them positive."""
    keys = {"PAIRS": pairs, "POSITIVE_PAIRS": pairs // 2}
    keys |= {"ANCHOR_POSITIVE_PAIRS": pairs // 2, "ANCHOR_NEGATIVE_PAIRS": pairs // 2}
    return [x for key, value in keys.items() for x in (f"{HEAD}.SAMPLING.{key}", value)]


FREQUENCIES = [*modules("SEMANTIC"), f"{HEAD}.SEMANTIC.FREEZE", True]
ADDITIVE = [*modules("SEMANTIC", "SPATIAL"), *PLAIN]
BENCHMARK = [
    Model("Freq", FREQUENCIES, trained=False),
    Model("Freq + Overlap", [*FREQUENCIES, f"{HEAD}.OVERLAP_FILTER", True], trained=False),
    Model("spatial, L0", [*modules("SPATIAL"), *PLAIN, *L0]),
    Model("semantic + spatial, L0", [*ADDITIVE, *L0]),
    Model("semantic + spatial, four losses", [*ADDITIVE, *FOUR]),
    Model("joint, L0", [*modules("JOINT"), *PLAIN, *L0]),
    Model("vrd_boxes (joint, tuned)", []),
]
LOSSES = [
    Model(f"{name}, {share}, {losses}", [*options, *pairs, *weights, "SOLVER.MAX_ITER", 513])
    for name, options in (
        ("semantic + spatial", ADDITIVE),
        ("joint, L0 per image", [f"{HEAD}.LOSS.L0_MEAN", "images"]),
        ("joint, tuned", []),
    )
    for share, pairs in (
        ("all pairs", sampling(20_000)),
        ("24 pairs", sampling(24)),
        ("8 pairs", sampling(8)),
    )
    for losses, weights in (("L0", L0), ("four losses", FOUR))
]

# Published on the same detections (Lu et al., ECCV 2016): the scores of their result file in this
# protocol; for annotated pairs their paper has 47.87. Nothing else is published on them.
PUBLISHED = {
    "name": "Lu et al. 2016, vision + language, published",
    "relationship_k1": [14.11, 14.96],
    "phrase_k1": [None, 17.33],
    "zero_shot_k1": [None, 5.39],
    "annotated_pairs_k1": [48.73, 48.73],
}

# Column of the report: block and metrics of an evaluation.
RECALLS = {
    "relationship_k1": ("lu2016_sgdet_k1", "relationship R@{}"),
    "relationship_k70": ("lu2016_sgdet_k70", "relationship R@{}"),
    "phrase_k1": ("lu2016_sgdet_k1", "phrase R@{}"),
    "phrase_k70": ("lu2016_sgdet_k70", "phrase R@{}"),
    "zero_shot_k1": ("lu2016_sgdet_k1", "zero-shot relationship R@{}"),
    "annotated_pairs_k1": ("lu2016_preddet_k1", "predicate R@{}"),
    "all_pairs_k1": ("lu2016_prdcls_k1", "predicate R@{}"),
    "all_pairs_k70": ("lu2016_prdcls_k70", "predicate R@{}"),
}
LIMITS = (1, 70)  # predicates per pair
ACCURACIES = ("instance_accuracy", "pairing_accuracy")  # with all predicates, boxes given


def run(model: Model, seed: int, detections: str | None, output: Path) -> dict[str, Any]:
    """Train a model with one seed and evaluate it; called in a process of its own.

    Args:
        model: what to train.
        seed: of the training.
        detections: file of detections of the test set; None scores the held-out images, with boxes
            and classes given.
        output: folder of the run.

    Returns:
        The columns of the report, seconds and peak memory.
    """
    import torch

    from reldn_d2 import load_config
    from reldn_d2.engine import RelDNTrainer
    from reldn_d2.engine.model_setup import ensure_frequency_table
    from reldn_d2.evaluation import VRDEvaluator

    from detectron2.evaluation import inference_on_dataset
    from detectron2.utils.env import seed_all_rng

    torch.set_num_threads(1)
    logging.basicConfig(filename=output / "log.txt", filemode="w", level=logging.INFO)
    logging.getLogger("detectron2").setLevel(logging.INFO)
    names, tasks = ("vrd_train", "vrd_test"), ("sgdet", "preddet", "prdcls")
    options = ["OUTPUT_DIR", str(output), "SEED", seed, *model.options]
    if detections is None:
        register_held_out()
        names, tasks = HELD_OUT, ("prdcls",)
    options += ["DATASETS.TRAIN", (names[0],)]
    started = time.time()
    seed_all_rng(seed)
    cfg = load_config(str(CONFIG), [*options, "DATASETS.TEST", ()])
    if model.trained:
        trainer = RelDNTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        network = trainer.model.eval()
    else:
        network = RelDNTrainer.build_model(cfg).eval()
        ensure_frequency_table(cfg, network)
    trained, results = time.time(), {}
    options += ["DATASETS.TEST", (names[1],), "TEST.RELATIONS.PREDICATES_PER_PAIR", list(LIMITS)]
    for task in tasks:
        more = ["TEST.RELATIONS.TASK", task]
        if task == "sgdet":
            more += ["DATASETS.DETECTION_FILES_TEST", (detections,)]
        cfg = load_config(str(CONFIG), [*options, *more])
        network.task = task
        evaluator = VRDEvaluator(names[1], task=task, predicates_per_pair=LIMITS)
        loader = RelDNTrainer.build_test_loader(cfg, names[1])
        results.update(inference_on_dataset(network, loader, evaluator))
    columns: dict[str, Any] = {
        column: [results[block][metric.format(n)] for n in (50, 100)]
        for column, (block, metric) in RECALLS.items()
        if block in results
    }
    accuracies = results["confusion_prdcls_k70"]
    columns.update({name: accuracies[name] for name in ACCURACIES})
    columns["training_seconds"] = trained - started
    columns["evaluation_seconds"] = time.time() - trained
    columns["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return columns


def register_held_out() -> None:
    """Split ``vrd_train``: 500 images are held out, always the same ones."""
    import numpy as np

    import reldn_d2  # noqa: F401  (registers vrd_train)
    from reldn_d2.data.boxes_only import load_without_images

    from detectron2.data import DatasetCatalog, MetadataCatalog

    records = load_without_images("vrd_train")
    chosen = set(np.random.default_rng(0).permutation(len(records))[:NUM_HELD_OUT].tolist())
    metadata = MetadataCatalog.get("vrd_train")
    for held_out, name in enumerate(HELD_OUT):
        part = [x for i, x in enumerate(records) if (i in chosen) == bool(held_out)]
        DatasetCatalog.register(name, lambda part=part: part)
        MetadataCatalog.get(name).set(
            thing_classes=metadata.thing_classes,
            predicate_classes=metadata.predicate_classes,
            evaluator_type=metadata.evaluator_type,
            train_dataset=HELD_OUT[0],
        )


def run_all(
    models: Sequence[Model],
    seeds: Sequence[int],
    detections: str | None,
    output: Path,
    processes: int,
) -> list[dict[str, Any]]:
    """Run every model with every seed, several at a time.

    Returns:
        One row per model: its name and seeds, and the mean and the standard deviation of each
        column.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    from reldn_d2.utils.user_modules import import_modules, imported_modules

    context = multiprocessing.get_context("spawn")
    start = dict(initializer=import_modules, initargs=(imported_modules(),))
    with context.Pool(processes, maxtasksperchild=1, **start) as pool:
        pending = []
        for model in models:
            for seed in seeds if model.trained else seeds[:1]:
                folder = output / model.name.replace(" ", "_").replace(",", "") / f"seed_{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                arguments = (model, seed, detections, folder)
                pending.append((model.name, seed, pool.apply_async(run, arguments)))
        runs: dict[str, dict[int, dict[str, Any]]] = {}  # by model and seed
        for name, seed, result in pending:
            runs.setdefault(name, {})[seed] = columns = result.get()
            print(f"{name}, seed {seed}: {format_run(columns)}", flush=True)
    return [summary(name, list(x), list(x.values())) for name, x in runs.items()]


def format_run(columns: dict[str, Any]) -> str:
    """Return the main figures of a run in a line."""
    main = columns.get("relationship_k1") or columns["all_pairs_k70"]
    return (
        f"R@50/100 {main[0]:.2f} / {main[1]:.2f}, training {columns['training_seconds']:.0f} s, "
        f"evaluation {columns['evaluation_seconds']:.0f} s"
    )


def summary(name: str, seeds: Sequence[int], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row: mean of each column, and ``deviation`` with the standard deviations."""
    import numpy as np

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    def apply(function: Callable[[Sequence[float]], float], column: str) -> Any:
        values = [run[column] for run in runs]
        if isinstance(values[0], list):
            return [function(x) for x in zip(*values)]
        return function(values)

    def deviation(values: Sequence[float]) -> float:
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    return {
        "name": name,
        "seeds": list(seeds),
        **{column: apply(mean, column) for column in runs[0]},
        "deviation": {column: apply(deviation, column) for column in runs[0]},
    }


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Format rows as a Markdown table of means ± standard deviations."""
    from tabulate import tabulate

    def number(mean: float, deviation: float, several: bool) -> str:
        return f"{mean:.2f} ± {deviation:.2f}" if several else f"{mean:.2f}"

    def cell(row: dict[str, Any], column: str) -> str:
        means, deviations = row[column], row["deviation"][column]
        if not isinstance(means, list):
            means, deviations = [means], [deviations]
        several = len(row["seeds"]) > 1
        return " / ".join(number(m, d, several) for m, d in zip(means, deviations))

    heads = ["%", *(column.replace("_", " ") for column in columns), "seeds", "training"]
    table = [
        [
            row["name"],
            *(cell(row, column) for column in columns),
            len(row["seeds"]),
            f"{row['training_seconds']:.0f} s",
        ]
        for row in rows
    ]
    return tabulate(table, heads, tablefmt="github", disable_numparse=True)


def ceiling(detections: str) -> float:
    """Return the share of the test set's relations with both boxes among the detections, in %.

    No model can find more of them.
    """
    import reldn_d2  # noqa: F401  (registers vrd_test)
    from reldn_d2.config import load_config
    from reldn_d2.data.build import load_test_dicts
    from reldn_d2.structures.boxes_np import pairwise_iou
    from reldn_d2.structures.scene_graph import SceneGraph

    options = ["DATASETS.DETECTION_FILES_TEST", (detections,), "TEST.RELATIONS.TASK", "sgdet"]
    cfg = load_config(str(CONFIG), options)
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    reachable, total = 0, 0
    for record in load_test_dicts(cfg, "vrd_test", num_classes, None, with_images=False):
        truth, found = SceneGraph.from_dataset_dict(record), record["detections"]
        same_class = truth.classes[:, None] == found["classes"][None]
        is_found = same_class & (pairwise_iou(truth.boxes, found["boxes"]) >= 0.5)
        subjects, objects = is_found[truth.pairs[:, 0]], is_found[truth.pairs[:, 1]]
        one_box = (subjects.sum(1) == 1) & (objects.sum(1) == 1) & (subjects & objects).any(1)
        reachable += int((subjects.any(1) & objects.any(1) & ~one_box).sum())
        total += len(truth.pairs)
    return 100 * reachable / total


def find_detections() -> str:
    """Return the file with Lu et al.'s detections, in the folder of VRD.

    Raises:
        FileNotFoundError: the annotations or the detections are missing.
    """
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "vrd"
    path = folder / "test_detections_rcnn.json"
    for needed in (folder / "json_dataset" / "annotations_train.json", path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"There is no {needed}. Set DETECTRON2_DATASETS to a folder with vrd/json_dataset "
                "(the annotations) and vrd/test_detections_rcnn.json, the detections; "
                "docs/benchmarks.md says where to get them. Images are not needed."
            )
    return str(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="train once per seed"
    )
    parser.add_argument(
        "--losses", action="store_true", help="compare the losses on held-out images"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="only this row; repeatable")
    parser.add_argument("--processes", type=int, default=2, help="trainings run in parallel")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    add_module_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE options of every run")
    args = parse_and_import(parser, arguments)
    models = LOSSES if args.losses else BENCHMARK
    unknown = [x for x in args.only or () if x not in [model.name for model in models]]
    if unknown:
        names = ", ".join(repr(model.name) for model in models)
        parser.error(f"no row is called {unknown[0]!r}; known: {names}")
    models = [
        model._replace(options=[*model.options, *args.opts])
        for model in models
        if not args.only or model.name in args.only
    ]
    try:
        detections = find_detections()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    from reldn_d2.utils.file_io import write_results

    started = time.time()
    name = "vrd_boxes_losses" if args.losses else "vrd_boxes"
    given = None if args.losses else detections
    rows = run_all(models, args.seeds, given, args.output / name, args.processes)
    columns = [*RECALLS, *ACCURACIES]
    columns = [x for x in columns if x in rows[0]]
    print(format_table(rows, columns))
    seconds = time.time() - started
    memory = max(row["peak_memory_mib"] for row in rows)
    print(f"{seconds:.0f} s in all; peak memory of a process {memory:.0f} MiB")
    path = args.output / f"{name}.json"
    content = {"rows": rows, "published": [PUBLISHED], "seconds": seconds}
    if not args.losses:
        content["ceiling"] = ceiling(detections)
        print(f"{content['ceiling']:.2f} % of the relations have both boxes among the detections")
    write_results(path, content)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
