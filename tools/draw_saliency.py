#!/usr/bin/env python
r"""Draw the feature maps of both CNNs, or the image regions that a triplet's score depends on.

Examples::

    python tools/draw_saliency.py --checkpoint model_final.pth --input street.jpg --output out
    python tools/draw_saliency.py --checkpoint model_final.pth --input street.jpg --output out \
        --levels p2 p4 fused
    python tools/draw_saliency.py --checkpoint model_final.pth --input street.jpg --output out \
        --triplets 0 1 2
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
import numpy as np
from PIL import Image

from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.image_io import distinct_paths, expand_inputs
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import
from reldn_d2.vis.saliency import FUSED, draw_feature_maps, draw_triplet_saliency


def _draw_triplet(predictor: RelationPredictor, file: str, rank: int, level: str) -> np.ndarray:
    return draw_triplet_saliency(predictor, file, rank, level)[0]


def main(arguments: list[str] | None = None) -> int:
    """Draw the pictures and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint of a trained RelDN")
    parser.add_argument("--input", nargs="+", required=True, help="images, globs, folders")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--levels",
        nargs="+",
        default=[FUSED],
        help="feature maps by their names in the config (p2 to p5), or fused; default: fused",
    )
    parser.add_argument(
        "--triplets", nargs="+", type=int, help="ranks of predicted triplets, 0 being the best"
    )
    add_module_argument(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE config overrides"
    )
    args = parse_and_import(parser, arguments)
    failed = 0
    try:
        predictor = RelationPredictor.from_checkpoint(args.checkpoint, opts=args.opts)
        files = expand_inputs(args.input)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        print(f"draw_saliency.py: {error}", file=sys.stderr)
        return 1
    pictures: dict[str, Callable] = {"features": partial(draw_feature_maps, levels=args.levels)}
    if args.triplets is not None:
        pictures = {
            f"triplet_{rank}_{level}": partial(_draw_triplet, rank=rank, level=level)
            for rank in args.triplets
            for level in args.levels
        }
    for file, start in distinct_paths(files, args.output, "").items():
        errors: dict[str, None] = {}  # a set in order, because levels may share an error
        for name, draw in pictures.items():
            try:
                picture = draw(predictor, file)
            except ValueError as error:  # an unusable image, or it has no detections
                errors[str(error)] = None
                continue
            path = start.with_name(f"{start.name}_{name}.png")
            Image.fromarray(picture).save(path)
            print(path)
        for line in errors:
            print(f"draw_saliency.py: {line}", file=sys.stderr)
        failed += len(errors)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
