#!/usr/bin/env python
"""Train box models with each method for rare predicates: no images, no GPU.

Boxes and classes are given (PRDCLS); the metrics are those of Neural Motifs. ``--held-out`` scores
images of the training set that are held out, for choosing settings; without it, models are trained
on the whole training set and scored on the test set, which makes the tables of docs/training.md.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # if the package is not installed

from benchmarks.vrd_data import hold_out, register_parts  # noqa: E402

HEAD = "MODEL.ROI_RELATION_HEAD"


# RelDN's two modules that need no pixels, with cross entropy alone; settings as in
# tools/vrd_benchmark.py.
MODEL = [
    *(f"{HEAD}.SEMANTIC.ENABLED", True, f"{HEAD}.SPATIAL.ENABLED", True),
    *(f"{HEAD}.JOINT.ENABLED", False, f"{HEAD}.LOSS.L0_MEAN", "images"),
    *("SOLVER.BASE_LR", 0.008, "SOLVER.WEIGHT_DECAY", 0.0001, "SOLVER.WEIGHT_DECAY_BIAS", None),
]


class Data(NamedTuple):
    """A dataset and the config that models are trained with."""

    train: str
    test: str
    config: str
    options: list[Any]
    # Values that are tried on held-out images; the one chosen there, by F1@50, comes first.
    repeat: list[float]  # DATALOADER.REPEAT_THRESHOLD
    beta: list[float]  # CLASS_BALANCED_BETA
    tau: list[float]  # LOGIT_ADJUSTMENT


DATASETS = {
    "vrd": Data(
        "vrd_train",
        "vrd_test",
        "VRD/reldn_boxes.yaml",
        [*MODEL, "SOLVER.MAX_ITER", 590],  # half of the config's
        repeat=[0.2, 0.05, 0.02],
        beta=[0.999, 0.99, 0.9],
        tau=[0.75, 0.25, 0.5, 1.0],
    ),
    "toy": Data(
        "toy_vrd_train",
        "toy_vrd_test",
        "VRD/reldn_boxes.yaml",
        [
            *(*MODEL, "SOLVER.MAX_ITER", 320),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 9, f"{HEAD}.NUM_PREDICATES", 6),
        ],
        repeat=[0.5, 0.2, 0.8],
        beta=[0.99, 0.9, 0.999],
        tau=[0.5, 0.25, 0.75, 1.0],
    ),
}
BLOCKS = {"constraint": "graph_constraint", "free": "no_constraint"}
METRICS = ("R", "mR", "F1", "zR", "head mR", "body mR", "tail mR")


def trainings(data: Data, all_settings: bool) -> dict[str, list[Any]]:
    """Return the options of each training by its name; the first has no method for rare predicates.

    Args:
        data: the dataset.
        all_settings: whether to include the settings that are not the chosen ones.
    """

    def repeated(threshold: float, rate: float) -> list[Any]:
        sampler = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorByPredicateSampler"]
        sampler += ["DATALOADER.REPEAT_THRESHOLD", threshold]
        return [*sampler, "DATALOADER.RELATION_DROP_RATE", rate]

    result: dict[str, list[Any]] = {"off": []}
    for threshold in data.repeat[: None if all_settings else 1]:
        for rate in (0.0, 0.7):
            result[f"t {threshold:g}, gamma {rate:g}"] = repeated(threshold, rate)
    for beta in data.beta[: None if all_settings else 1]:
        result[f"beta {beta:g}"] = [f"{HEAD}.LOSS.CLASS_BALANCED_BETA", beta]
    return result


def run(
    dataset: str,
    name: str,
    options: list[Any],
    seed: int,
    held_out: bool,
    taus: Sequence[float],
    output: Path,
) -> dict[str, dict[str, Any]]:
    """Train with one setting and one seed and evaluate each tau; called in a process of its own.

    Returns:
        Columns of the report by row.
    """
    from reldn_d2 import load_config
    from reldn_d2.engine import RelDNTrainer
    from reldn_d2.evaluation import SceneGraphEvaluator

    from detectron2.evaluation import inference_on_dataset
    from detectron2.utils.env import seed_all_rng

    logging.basicConfig(filename=output / "log.txt", filemode="w", level=logging.INFO)
    data = DATASETS[dataset]
    train, test = split(data.train, held_out, None if held_out else data.test)
    config = str(PROJECT / "configs" / data.config)
    options = [*data.options, "OUTPUT_DIR", str(output), "SEED", seed, *options]
    options += ["DATASETS.TRAIN", (train,), "TEST.RELATIONS.PREDICATES_PER_PAIR", [1, None]]
    seed_all_rng(seed)
    started = time.time()
    trainer = RelDNTrainer(load_config(config, [*options, "DATASETS.TEST", ()]))
    trainer.resume_or_load(resume=False)
    trainer.train()
    model, seconds = trainer.model.eval(), time.time() - started
    model.task = "prdcls"
    rows = {}
    cfg = load_config(config, [*options, "DATASETS.TEST", (test,)])
    for tau in taus:
        model.relation_head.prior.tau = tau
        loader = RelDNTrainer.build_test_loader(cfg, test)
        results = inference_on_dataset(model, loader, SceneGraphEvaluator(test, task="prdcls"))
        columns: dict[str, Any] = {
            f"{metric} {k}": [results[f"motifs_prdcls_{block}"][f"{metric}@{n}"] for n in (50, 100)]
            for k, block in BLOCKS.items()
            for metric in METRICS
        }
        rows[name if tau == 0 else f"{name}, tau {tau:g}"] = {
            **columns,
            "training_seconds": seconds,
        }
    return rows


def split(train: str, held_out: bool, test: str | None) -> tuple[str, str]:
    """Register the datasets to train and to score on; return their names.

    Args:
        train: registered training set.
        held_out: train on a part of it and score the others, 500 images that are always the same.
        test: registered test set, if no image is held out.
    """
    import reldn_d2  # noqa: F401  (registers the datasets)
    from reldn_d2.data.boxes_only import load_without_images

    records = load_without_images(train)
    rest, scored = hold_out(records) if held_out else (records, load_without_images(test))
    register_parts(train, {"tail_train": rest, "tail_test": scored}, "scene_graph")
    return "tail_train", "tail_test"


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every setting with every seed, several at a time; return one row per setting and tau."""
    from vrd_benchmark import summary

    from reldn_d2.utils.processes import start_pool_worker
    from reldn_d2.utils.user_modules import imported_modules

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started now
    data = DATASETS[args.dataset]
    taus = [0.0, *data.tau[: None if args.held_out else 1]]
    settings = trainings(data, args.held_out)
    context = multiprocessing.get_context("spawn")
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    start = dict(initializer=start_pool_worker, initargs=(imported_modules(),))
    with context.Pool(args.processes, maxtasksperchild=1, **start) as pool:
        pending = []
        for seed in args.seeds:
            for name, options in settings.items():
                if args.only and name not in args.only:
                    continue
                folder = args.output / args.dataset / name.replace(" ", "_").replace(",", "")
                folder = folder / f"{'held_out' if args.held_out else 'test'}_{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                case = (args.dataset, name, [*options, *args.opts], seed, args.held_out, taus)
                pending.append((seed, pool.apply_async(run, (*case, folder))))
        for seed, result in pending:
            for row, columns in result.get().items():
                rows.setdefault(row, {})[seed] = columns
                shown = ", ".join(
                    f"{x} {columns[f'{x} constraint'][0]:.2f}" for x in ("R", "mR", "F1")
                )
                print(f"{row}, seed {seed}: {shown}", flush=True)
    return [summary(row, list(x), list(x.values())) for row, x in rows.items()]


def format_table(rows: Sequence[dict[str, Any]], k: str, n: int) -> str:
    """Format rows as a Markdown table of means ± standard deviations over seeds.

    Args:
        rows: of :func:`run_all`.
        k: a key of ``BLOCKS``.
        n: 50 or 100.
    """
    from tabulate import tabulate

    index = (50, 100).index(n)

    def cell(row: dict[str, Any], column: str) -> str:
        mean, deviation = row[column][index], row["deviation"][column][index]
        return f"{mean:.1f} ± {deviation:.1f}" if len(row["seeds"]) > 1 else f"{mean:.1f}"

    table = [[row["name"], *(cell(row, f"{x} {k}") for x in METRICS)] for row in rows]
    heads = [f"{BLOCKS[k].replace('_', ' ')}, n = {n}", *METRICS]
    return tabulate(table, heads, tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="vrd")
    parser.add_argument(
        "--held-out", action="store_true", help="all settings, on held-out training images"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="train once per seed"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="only this training")
    parser.add_argument("--processes", type=int, default=2, help="trainings run in parallel")
    parser.add_argument("--output", type=Path, default=Path("output/long_tail"))
    add_module_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE options of every run")
    args = parse_and_import(parser, arguments)
    known = list(trainings(DATASETS[args.dataset], args.held_out))
    unknown = [x for x in args.only or () if x not in known]
    if unknown:
        parser.error(f"no training is called {unknown[0]!r}; known: {', '.join(map(repr, known))}")
    rows = run_all(args)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.dataset}{'_held_out' if args.held_out else ''}.json"
    path.write_text(json.dumps(rows, indent=1))
    for k in BLOCKS:
        print(f"\n{format_table(rows, k, 50)}")
    print(f"\nWrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
