#!/usr/bin/env python
r"""Convert predictions that another program has pickled to relation_predictions.json.

Nothing in the files is executed; files with other objects than numbers, text, arrays and plain
containers are refused. docs/evaluation.md describes the formats.

Examples:
    python tools/import_predictions.py --from tang --input eval_results.pytorch \
        --dataset visual_genome_test --task sgdet --output theirs/relation_predictions.json
    python tools/evaluate_relations.py --dataset visual_genome_test \
        --predictions theirs/relation_predictions.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the datasets
from reldn_d2.data.datasets.catalog import (
    DATASET_ERRORS,
    dataset_names,
    require_dataset,
)
from reldn_d2.data.datasets.importers import read_name_file
from reldn_d2.evaluation.imported_predictions import import_predictions
from reldn_d2.evaluation.pickled_predictions import IMPORT_FORMATS
from reldn_d2.evaluation.predictions_io import write_predictions, write_settings
from reldn_d2.structures.relations import TASKS
from reldn_d2.utils.events import log_to_terminal
from reldn_d2.utils.file_io import check_writable
from reldn_d2.utils.protocols import all_predicates_per_pair
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="file_format",
        required=True,
        choices=list(IMPORT_FORMATS),
        help="tang: eval_results.pytorch of Scene-Graph-Benchmark; motifs: the pickle of Neural "
        "Motifs; released: rel_detections.pkl of RelDN's authors",
    )
    parser.add_argument("--input", required=True, help="the file to convert")
    parser.add_argument(
        "--dataset",
        required=True,
        help="registered dataset that was evaluated; its images, or those with relations, in its "
        "order",
    )
    add_module_argument(parser)
    parser.add_argument("--task", required=True, choices=TASKS, help="task that was evaluated")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="classes in the order of the file's ids, without background: one name per line, or a "
        "JSON list; default: the order of the dataset",
    )
    parser.add_argument("--predicates", metavar="FILE", help="the predicates, likewise")
    parser.add_argument(
        "--first-class-id",
        type=int,
        choices=(0, 1),
        help="id of the first class; default: 1, and for released what its ids imply",
    )
    parser.add_argument(
        "--long-side",
        type=int,
        metavar="PIXELS",
        help="motifs: long side of the images that the boxes refer to; 0: the original images; "
        "default: 1024",
    )
    parser.add_argument(
        "--topk",
        type=int,
        default=100,
        help="triplets to keep per image, for each number of predicates per pair; default: 100",
    )
    args = parse_and_import(parser, arguments)
    if args.topk < 1:
        parser.error("--topk must be at least 1")
    try:
        require_dataset(args.dataset)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Convert the file and return the exit status."""
    args = parse_arguments(arguments)
    log_to_terminal()
    try:
        check_writable(args.output)
        predictions = import_predictions(
            args.file_format,
            args.input,
            args.dataset,
            class_names=args.classes and read_name_file(args.classes, "classes"),
            predicate_names=args.predicates and read_name_file(args.predicates, "predicates"),
            first_class_id=args.first_class_id,
            long_side=args.long_side,
            topk=args.topk,
        )
        write_predictions(predictions, args.output)
        settings = {
            "dataset": args.dataset,
            "task": args.task,
            "predicates_per_pair": list(all_predicates_per_pair()),
            "triplets": args.topk,
            **dataset_names(args.dataset),
        }
        write_settings(args.output, settings)
    except DATASET_ERRORS as error:
        print(f"import_predictions.py: error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
