#!/usr/bin/env python
"""Convert a registered dataset to a COCO file with relations (datasets/README.md, "Your own").

Example::

    python tools/convert_to_relation_instances.py --dataset vrd_train --output vrd_train.json
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the datasets
from reldn_d2.data.datasets import to_relation_instances
from reldn_d2.data.datasets.catalog import DATASET_ERRORS, require_dataset
from reldn_d2.utils.file_io import check_writable, write_atomically
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

from detectron2.data import DatasetCatalog, MetadataCatalog


def main(arguments: list[str] | None = None) -> int:
    """Convert the dataset and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="name of the registered dataset")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument(
        "--image-root",
        help="folder that file names become relative to; default: that of the dataset",
    )
    add_module_argument(parser)
    args = parse_and_import(parser, arguments)
    try:
        check_writable(args.output)
        require_dataset(args.dataset)
        dicts, metadata = DatasetCatalog.get(args.dataset), MetadataCatalog.get(args.dataset)
        image_root = (
            args.image_root
            or metadata.get("image_root")
            or os.path.commonpath(
                [os.path.dirname(os.path.abspath(record["file_name"])) for record in dicts]
            )
        )
        content = to_relation_instances(
            dicts,
            metadata.thing_classes,
            metadata.predicate_classes,
            image_root,
            metadata.get("attribute_classes", ()),
        )
        with write_atomically(args.output) as file:
            json.dump(content, file)
    except DATASET_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    relations = sum(len(image["relations"]) for image in content["images"])
    print(
        f"{args.output}: {len(content['images']):,} images, {len(content['annotations']):,} boxes, "
        f"{relations:,} relations; image_root={image_root}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
