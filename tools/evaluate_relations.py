#!/usr/bin/env python
r"""Score a predictions file again, the model's own or anyone's, without model or images.

Examples:
    python tools/evaluate_relations.py --dataset vrd_test \
        --predictions output/vrd/reldn_small/inference/sgdet/relation_predictions.json
    python tools/evaluate_relations.py --dataset visual_genome_test --predictions theirs.json.gz \
        --protocol motifs --task prdcls --output output/theirs
"""

import argparse
import csv
import os
import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the datasets
from reldn_d2.data.datasets.catalog import require_dataset
from reldn_d2.evaluation import evaluate_predictions
from reldn_d2.evaluation.offline import read_file
from reldn_d2.evaluation.submission import LAYOUTS, write_submission
from reldn_d2.structures.relations import TASKS
from reldn_d2.utils.events import log_to_terminal
from reldn_d2.utils.file_io import check_writable, check_writable_folder, write_results
from reldn_d2.utils.programs import program_help, program_name
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY, find_protocol
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

from detectron2.data import MetadataCatalog


def limit(text: str) -> int | None:
    """Parse a number of predicates per pair; ``all`` (or 0) means no limit."""
    return None if text == "all" else int(text) or None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and import the modules of ``--module``."""
    parser = argparse.ArgumentParser(
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="a registered dataset")
    add_module_argument(parser)
    parser.add_argument(
        "--predictions",
        required=True,
        help="relation_predictions.json, or a .csv of the OpenImages challenge; plain or gzipped",
    )
    parser.add_argument(
        "--protocol",
        default="",
        metavar="NAME",
        help=f"{', '.join(PROTOCOL_REGISTRY)}, or one that --module registers; default: the "
        "dataset's own",
    )
    parser.add_argument("--task", choices=TASKS, help="default: the one the file was written for")
    parser.add_argument(
        "--predicates-per-pair",
        type=limit,
        nargs="+",
        metavar="K",
        help="best predicates that count per pair; each value has results of its own; 'all' means "
        "no limit; default: the protocol's",
    )
    parser.add_argument(
        "--recall-at",
        type=int,
        nargs="+",
        metavar="N",
        help="the n of R@n; default: the protocol's",
    )
    parser.add_argument(
        "--train-dataset",
        help="for zero-shot recall and the predicates' frequencies; default: the one that the "
        "dataset names",
    )
    parser.add_argument(
        "--group-thresholds",
        type=int,
        nargs=2,
        default=(),
        metavar=("HEAD", "TAIL"),
        help="a predicate with at least HEAD training relations belongs to the head, one with "
        "fewer than TAIL to the tail; default: thirds of the predicates",
    )
    parser.add_argument(
        "--output", help="folder for results.json and the tables and plots of all predicates"
    )
    parser.add_argument(
        "--write-submission", metavar="FILE", help="also write the predictions as such a .csv"
    )
    parser.add_argument(
        "--layout", default="server", choices=LAYOUTS, help="layout of --write-submission"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="names of the classes in a .csv of the challenge: the first column of this CSV file, "
        "in the order of the classes (challenge-2018-classes-vrd.csv), optionally followed by "
        "those of the attributes; default: thing_labels of the metadata, or thing_classes",
    )
    args = parse_and_import(parser, arguments)
    try:
        for name in filter(None, (args.dataset, args.train_dataset)):
            require_dataset(name)
        if args.protocol:
            find_protocol(args.protocol)
    except ValueError as error:
        parser.error(str(error))
    return args


def read_labels(file: str) -> list[str]:
    """Read the first column of a CSV file."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        return [row[0].strip() for row in csv.reader(stream) if row]


def main(arguments: list[str] | None = None) -> int:
    """Score a predictions file and return the exit status."""
    args = parse_arguments(arguments)
    log_to_terminal()
    if args.train_dataset:
        metadata = MetadataCatalog.get(args.dataset)
        vars(metadata).pop("train_dataset", None)  # which cannot be changed otherwise
        metadata.train_dataset = args.train_dataset
    try:
        if args.output:
            check_writable_folder(args.output)
        if args.write_submission:
            check_writable(args.write_submission)
        labels = read_labels(args.labels) if args.labels else None
        results = evaluate_predictions(
            args.dataset,
            args.predictions,
            args.output,
            task=args.task,
            protocol=args.protocol,
            predicates_per_pair=args.predicates_per_pair,
            recall_at=args.recall_at,
            labels=labels,
            group_thresholds=args.group_thresholds,
        )
        if args.output:
            path = os.path.join(args.output, "results.json")
            write_results(path, results)
            print(f"Wrote {path}")
        if args.write_submission:
            predictions = read_file(args.dataset, args.predictions, labels)
            write_submission(args.dataset, predictions, args.write_submission, args.layout, labels)
            print(f"Wrote {args.write_submission}")
    except (OSError, ValueError) as error:
        print(f"{program_name(__file__)}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
