#!/usr/bin/env python
r"""Convert annotations in another format to a COCO file with relations (docs/own_data.md).

Examples:
    python tools/import_relations.py --from csv --input relations.csv --output relations.json
    python tools/import_relations.py --from psg --split train --input psg.json \
        --output psg_train.json
    python tools/import_relations.py --from visual-genome --input relationships.json \
        --classes classes.txt --predicates predicates.txt --skip-invalid --output vg.json
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  before Detectron2
from reldn_d2.data.datasets import import_relations, to_relation_instances
from reldn_d2.data.datasets.importers import FORMATS, ImportOptions, read_name_file
from reldn_d2.utils.events import log_to_terminal
from reldn_d2.utils.file_io import check_writable, write_atomically

_SHOWN = 20  # problems on the terminal


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="file_format", required=True, choices=list(FORMATS), help="format of --input"
    )
    parser.add_argument("--input", required=True, help="the file to convert")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="entity classes in the order of their ids: a text file with one name per line or a "
        "JSON list; other classes are errors; default: all, in the order of the file if it lists "
        "them, otherwise in alphabetical order",
    )
    parser.add_argument("--predicates", metavar="FILE", help="the predicates, likewise")
    parser.add_argument(
        "--attributes",
        metavar="FILE",
        help="the attributes of entities, likewise (visual-genome, sgg-benchmark); with "
        "--skip-invalid an entity only loses the others",
    )
    parser.add_argument(
        "--image-root",
        help="folder of the images; needed only if the file has no image sizes or absolute paths",
    )
    parser.add_argument(
        "--image-data",
        metavar="FILE",
        help="visual-genome: image_data.json with the image sizes; default: next to --input",
    )
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        help="psg: only the images of this split; default: all",
    )
    parser.add_argument(
        "--panoptic-root",
        metavar="FOLDER",
        help="psg: folder of the panoptic PNG files; entities then get masks",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of the records that can be ignored; other unknown fields are errors",
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave out records with problems, such as classes that are not in --classes, and "
        "report their count, instead of stopping",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Convert the file and return the exit status."""
    args = parse_arguments(arguments)
    log_to_terminal()
    try:
        check_writable(args.output)
        options = ImportOptions(
            image_root=args.image_root,
            classes=args.classes and read_name_file(args.classes, "classes"),
            predicates=args.predicates and read_name_file(args.predicates, "predicates"),
            attributes=args.attributes and read_name_file(args.attributes, "attributes"),
            panoptic_root=args.panoptic_root,
            image_data=args.image_data,
            split=args.split,
            ignore=tuple(args.ignore),
            skip_invalid=args.skip_invalid,
        )
        imported = import_relations(args.file_format, args.input, options)
        dicts, classes, predicates, attributes = imported
        content = to_relation_instances(dicts, classes, predicates, ".", attributes)
        with write_atomically(args.output) as file:
            json.dump(content, file)
    except (OSError, ValueError) as error:
        problems = getattr(error, "problems", [str(error)])
        for problem in problems[:_SHOWN]:
            print(f"error: {problem}", file=sys.stderr)
        if hasattr(error, "problems"):
            print(
                f"{len(problems)} records have problems; --skip-invalid leaves them out.",
                file=sys.stderr,
            )
        return 1
    relations = sum(len(image["relations"]) for image in content["images"])
    print(
        f"{args.output}: {len(content['images']):,} images, {len(content['annotations']):,} boxes "
        f"of {len(imported.thing_classes)} classes, {relations:,} relations with "
        f"{len(imported.predicate_classes)} predicates"
        + (f", {len(attributes)} attributes" if attributes else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
