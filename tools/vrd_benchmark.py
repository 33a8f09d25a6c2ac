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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if it is not installed

from benchmarks.vrd_data import CONFIG, ceiling, find_detections, prepared
from benchmarks.vrd_table import (
    ACCURACIES,
    LOSSES_CORNER,
    LOSSES_TABLE,
    PUBLISHED,
    RECALL_AT,
    RECALLS,
    TABLE,
    format_table,
)

LIMITS = (1, 70)  # predicates per pair

HEAD = "MODEL.ROI_RELATION_HEAD"
MODULES = ("SEMANTIC", "SPATIAL", "JOINT")
L0 = [x for i in (1, 2, 3) for x in (f"{HEAD}.LOSS.LAMBDA_{i}", 0.0)]
FOUR = [x for i, y in ((1, 1.0), (2, 0.5), (3, 0.1)) for x in (f"{HEAD}.LOSS.LAMBDA_{i}", y)]
# The paper's score of a triplet, and the optimizer and L0 of all rows but the last, whose settings
# were chosen on held-out images. The losses are compared without the shrinkage of test time.
PLAIN_SCORE = ["TEST.RELATIONS.ENTITY_SCORE_EXPONENT", 1.0]
PLAIN = ["SOLVER.BASE_LR", 0.008, "SOLVER.WEIGHT_DECAY", 0.0001, f"{HEAD}.LOSS.L0_MEAN", "images"]
UNSHRUNK = [f"{HEAD}.JOINT.EMBEDDING_SHRINKAGE", 0.0]
PLAIN += ["SOLVER.WEIGHT_DECAY_BIAS", None, *PLAIN_SCORE, *UNSHRUNK]


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


FREQUENCIES = [*modules("SEMANTIC"), f"{HEAD}.SEMANTIC.FREEZE", True, *PLAIN_SCORE]
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
        ("joint, L0 per image", [f"{HEAD}.LOSS.L0_MEAN", "images", *UNSHRUNK]),
        ("joint, tuned", UNSHRUNK),
    )
    for share, pairs in (
        ("all pairs", sampling(20_000)),
        ("24 pairs", sampling(24)),
        ("8 pairs", sampling(8)),
    )
    for losses, weights in (("L0", L0), ("four losses", FOUR))
]


def run(model: Model, seed: int, detections: str | None, output: Path) -> dict[str, Any]:
    """Train a model with one seed and evaluate it.

    What does not depend on model and seed is prepared once per process, see :func:`prepared`.

    Args:
        model: what to train.
        seed: of the training.
        detections: file of detections of the test set; None scores the held-out images, with boxes
            and classes given.
        output: folder of the run.

    Returns:
        The columns of the report, seconds and peak memory.
    """
    from reldn_d2 import load_config
    from reldn_d2.evaluation import VRDEvaluator

    from detectron2.evaluation import inference_on_dataset
    from detectron2.utils.env import seed_all_rng

    prepare = prepared(detections is None)
    (train, test), tasks = prepare.names, prepare.tasks
    options = ["OUTPUT_DIR", str(output), "SEED", seed, "DATASETS.TRAIN", (train,)]
    options += [*model.options, "DATASETS.TEST", ()]
    started, results = [time.time(), time.process_time()], {}
    with log_to(output / "log.txt"):
        seed_all_rng(seed)
        network = prepare.train(load_config(CONFIG, options), model.trained)
        trained = [time.time(), time.process_time()]
        network.relation_head.predicates_per_pair = LIMITS  # no others, which also take time
        for task in tasks:
            batches = prepare.test_batches(detections if task == "sgdet" else None)
            network.task = task
            evaluator = VRDEvaluator(test, task=task, predicates_per_pair=LIMITS)
            results.update(inference_on_dataset(network, batches, evaluator))
    columns: dict[str, Any] = {
        column: [results[block][metric.format(n)] for n in RECALL_AT]
        for column, (block, metric) in RECALLS.items()
        if block in results
    }
    accuracies = results["confusion_prdcls_k70"]
    columns.update({name: accuracies[name] for name in ACCURACIES})
    if model.trained:
        columns["training_seconds"] = trained[0] - started[0]
    columns["evaluation_seconds"] = time.time() - trained[0]
    columns["processor_seconds"] = time.process_time() - started[1]
    columns["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return columns


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write all log lines to a file."""
    root, handler = logging.getLogger(), logging.FileHandler(path, mode="w")
    levels = [(x, x.level) for x in (root, logging.getLogger("detectron2"))]
    root.addHandler(handler)
    for logger, _ in levels:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        for logger, level in levels:
            logger.setLevel(level)


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
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started now
    from reldn_d2.utils.processes import start_pool_worker
    from reldn_d2.utils.user_modules import imported_modules

    context = multiprocessing.get_context("spawn")
    start = dict(initializer=start_pool_worker, initargs=(imported_modules(),))
    runs: dict[str, dict[int, dict[str, Any]]] = {model.name: {} for model in models}
    with context.Pool(processes, **start) as pool:
        pending = []
        # The later rows take longer. Short ones at the end let all processes end together.
        for model in reversed(models):
            for seed in seeds if model.trained else seeds[:1]:
                folder = output / model.name.replace(" ", "_").replace(",", "") / f"seed_{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                arguments = (model, seed, detections, folder)
                pending.append((model.name, seed, pool.apply_async(run, arguments)))
        for name, seed, result in pending:
            runs[name][seed] = columns = result.get()
            print(f"{name}, seed {seed}: {format_run(columns)}", flush=True)
    return [summary(name, list(x), list(x.values())) for name, x in runs.items()]


def processor_seconds() -> float:
    """Return the processor time of the processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def format_run(columns: dict[str, Any]) -> str:
    """Return the main figures of a run in a line."""
    main = columns.get("relationship_k1") or columns["all_pairs_k70"]
    return (
        f"R@50/100 {main[0]:.2f} / {main[1]:.2f}, training "
        f"{columns.get('training_seconds', 0):.0f} s, evaluation "
        f"{columns['evaluation_seconds']:.0f} s, processor {columns['processor_seconds']:.0f} s"
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

    started, before = time.time(), processor_seconds()
    name = "vrd_boxes_losses" if args.losses else "vrd_boxes"
    given = None if args.losses else detections
    rows = run_all(models, args.seeds, given, args.output / name, args.processes)
    if args.losses:
        print(format_table(rows, LOSSES_TABLE, LOSSES_CORNER))
    else:
        print(format_table([PUBLISHED, *rows], TABLE))
    seconds = time.time() - started
    memory = max(row["peak_memory_mib"] for row in rows)
    processor = processor_seconds() - before
    print(
        f"{seconds:.0f} s in all, {processor:.0f} s of the processor; peak memory of a process "
        f"{memory:.0f} MiB"
    )
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
