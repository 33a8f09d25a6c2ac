#!/usr/bin/env python
r"""Draw where the detector's CNN and the predicate CNN look, or what a triplet's score hangs on.

Examples::

    python tools/draw_saliency.py --checkpoint model_final.pth --input street.jpg --output out
    python tools/draw_saliency.py --checkpoint model_final.pth --input street.jpg --output out \
        --levels p2 p4 fused
    python tools/draw_saliency.py --checkpoint model_final.pth --input street.jpg --output out \
        --triplets 0 1 2
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  bridges gaps before Detectron2 is imported
from PIL import Image

from reldn_d2.images import ImageError, find_images
from reldn_d2.predictor import RelationPredictor
from reldn_d2.saliency import FUSED, draw_feature_maps, draw_triplet_saliency


def main(arguments: Optional[List[str]] = None) -> int:
    """Draw; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a trained RelDN")
    parser.add_argument("--input", nargs="+", required=True, help="images, globs, folders")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--levels",
        nargs="+",
        default=[FUSED],
        help="feature maps, as the config names them (p2 to p5), or fused; default: fused",
    )
    parser.add_argument(
        "--triplets", nargs="+", type=int, help="ranks of predicted triplets, 0 being the best"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE options")
    args = parser.parse_args(arguments)
    failed = 0
    try:
        predictor = RelationPredictor.from_checkpoint(args.checkpoint, opts=args.opts)
        files = find_images(args.input)
    except (FileNotFoundError, KeyError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        print(f"draw_saliency.py: {reason}", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    used: Dict[str, int] = {}
    for file in files:
        stem = Path(file).stem
        used[stem] = used.get(stem, 0) + 1
        stem += f"_{used[stem]}" if used[stem] > 1 else ""  # of one name in another folder
        try:
            if args.triplets is None:
                pictures = {"features": draw_feature_maps(predictor, file, args.levels)}
            else:
                pictures = {
                    f"triplet_{rank}_{level}": draw_triplet_saliency(predictor, file, rank, level)[
                        0
                    ]
                    for rank in args.triplets
                    for level in args.levels
                }
        except ImageError as error:
            print(f"draw_saliency.py: {error}", file=sys.stderr)
            failed += 1
            continue
        for name, picture in pictures.items():
            path = args.output / f"{stem}_{name}.png"
            Image.fromarray(picture).save(path)
            print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
