#!/usr/bin/env python
r"""Export a trained RelDN as TorchScript: one file that needs torch and torchvision only.

Example::

    python tools/export_model.py --checkpoint model_final.pth --image street.jpg \
        --output reldn.ts --height 800 --width 1216

The example image is resized to the given size and used for tracing; the exported model then accepts
images of that size only, as a (3, height, width) tensor. As a check, the file is loaded in a new
process without this package, and its outputs on the example are compared with the eager model's.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
import numpy as np
import torch
from PIL import Image

from reldn_d2.export import save_torchscript
from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.file_io import check_writable
from reldn_d2.utils.image_io import read_rgb
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

# A program of its own: it shows all that a user of the exported file needs.
_RUN = """
import sys, torch, torchvision
model = torch.jit.load(sys.argv[1])
with torch.no_grad():
    outputs = model(torch.load(sys.argv[2]))
assert not any(name.startswith(("reldn_d2", "detectron2")) for name in sys.modules)
torch.save(outputs, sys.argv[3])
"""


def run_in_new_process(path: Path, example: torch.Tensor) -> list[torch.Tensor]:
    """Run an exported file in a process without this package or Detectron2; return its outputs."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "in.pt", Path(folder) / "out.pt"
        torch.save(example, given)
        files = [str(x) for x in (path.resolve(), given, result)]
        command = [sys.executable, "-W", "ignore", "-c", _RUN, *files]
        subprocess.run(command, check=True, cwd=folder)
        return list(torch.load(result, weights_only=True))


def main(arguments: list[str] | None = None) -> int:
    """Export a model; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint of a trained RelDN")
    parser.add_argument("--image", required=True, help="example image that shows a relation")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write, such as reldn.ts"
    )
    parser.add_argument("--height", type=int, help="input size (default: as in evaluation)")
    parser.add_argument("--width", type=int, help="input size (default: as in evaluation)")
    add_module_argument(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    args = parse_and_import(parser, arguments)
    if (args.height is None) != (args.width is None):
        parser.error("--height and --width must be given together")
    try:
        check_writable(args.output)
        predictor = RelationPredictor.from_checkpoint(args.checkpoint, "cpu", opts=args.opts)
        rgb = read_rgb(args.image)
        if args.height:
            size = (args.width, args.height)
            rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.BILINEAR))
            bgr = rgb[:, :, ::-1] if predictor.cfg.INPUT.FORMAT == "BGR" else rgb
            example = torch.as_tensor(np.ascontiguousarray(bgr.transpose(2, 0, 1))).float()
        else:
            example = predictor.prepare(rgb)["image"].float()
        expected = save_torchscript(
            predictor.model,
            example,
            args.output,
            predictor.thing_classes,
            predictor.predicate_classes,
            predictor.cfg.INPUT.FORMAT,
        )
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(f"export_model.py: {error}", file=sys.stderr)
        return 1
    outputs = run_in_new_process(args.output, example)
    same = all(torch.equal(outputs[i], expected[i]) for i in (1, 3, 4))
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        print(
            f"export_model.py: {args.output}: in a new process it finds {len(outputs[0])} entities "
            f"and {len(outputs[3])} relations, the eager model {len(expected[0])} and "
            f"{len(expected[3])}",
            file=sys.stderr,
        )
        return 1
    difference = max(
        (float((a - b).abs().max()) for a, b in zip(outputs, expected) if a.numel()), default=0.0
    )
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {size:.1f} MB, input {tuple(example.shape)}")
    print(
        f"in a new process: {len(outputs[0])} entities, {len(outputs[3])} relations, "
        f"{'the same' if same else 'NOT the same'} triplets as the eager model; largest difference "
        f"of any value {difference:.1e}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
