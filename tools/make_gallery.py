#!/usr/bin/env python
r"""Write an HTML gallery of an evaluation: each image with its ranked triplets, hits and misses.

Example::

    python tools/make_gallery.py --dataset vrd_test --output output/vrd/gallery.html \
        --predictions output/vrd/reldn_small/inference/sgdet/relation_predictions.json
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the datasets
from draw_relations import add_arguments, load_arguments
from tqdm import tqdm

from reldn_d2.utils.image_io import read_rgb
from reldn_d2.utils.user_modules import parse_and_import
from reldn_d2.vis.gallery import gallery_record, write_gallery


def main(arguments: list[str] | None = None) -> int:
    """Write the page and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, predictions_required=True)
    parser.add_argument("--output", type=Path, required=True, help="HTML file")
    parser.add_argument("--max-images", type=int, help="only the first N images; default: all")
    parser.add_argument(
        "--top-k", type=int, default=20, help="max relations listed per image; default: 20"
    )
    parser.add_argument(
        "--side",
        type=int,
        default=400,
        help="longest side of each picture in pixels; default: 400",
    )
    args = parse_and_import(parser, arguments)
    loaded = load_arguments(parser, args)
    metadata = loaded.metadata
    chosen = [x for x in loaded.dicts if x["image_id"] in loaded.predictions][: args.max_images]
    failed: list[str] = []

    def records() -> Iterator[dict[str, Any]]:
        for record in tqdm(chosen, unit="image", disable=None):
            try:
                yield gallery_record(
                    Path(record["file_name"]).name,
                    read_rgb(record["file_name"]),
                    loaded.predicted(record),
                    metadata,
                    record,
                    topk=args.top_k,
                    side=args.side,
                    protocol=loaded.protocol,
                )
            except ValueError as error:  # not an image, or not of the record's size
                failed.append(str(error))

    title = f"{args.dataset}: {'/'.join(args.predictions.resolve().parts[-4:-1])}"
    try:
        count = write_gallery(args.output, records(), title, metadata.predicate_classes)
    except OSError as error:
        parser.error(f"--output {args.output}: {error}")
    print(f"{args.output}: {count} images, {args.output.stat().st_size / 1e6:.1f} MB")
    for line in failed:
        print(f"skipped: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
