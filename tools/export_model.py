#!/usr/bin/env python
r"""Export a trained RelDN as one file that runs without this package and Detectron2.

Examples::

    python tools/export_model.py --checkpoint model_final.pth --image street.jpg --output reldn.onnx
    python tools/export_model.py --checkpoint model_final.pth --image street.jpg --given-boxes \
        --output reldn_boxes.onnx
    python tools/export_model.py --pretrained vrd_boxes --given-boxes --output vrd_boxes.onnx
    python tools/export_model.py --checkpoint model_final.pth --image street.jpg \
        --output reldn.ts --height 800 --width 1216

ONNX needs onnxruntime only, TorchScript needs torch and torchvision. As a check, the file runs in a
new process, on the images, on other sizes of them and on other numbers of boxes, and its outputs
are compared with the eager model's. A file that fails the check is kept as OUTPUT.unchecked. See
docs/export.md.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reldn_d2.export import GivenBoxesExport, RelDNExport, save_onnx, save_torchscript
from reldn_d2.export.comparison import compare_outputs
from reldn_d2.export.graphs import ExportedGraph
from reldn_d2.export.onnx_file import check_packages
from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.file_io import check_writable
from reldn_d2.utils.image_io import from_rgb, read_rgb
from reldn_d2.utils.programs import program_help, program_name
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

SAVE = {"onnx": save_onnx, "torchscript": save_torchscript}

# Programs of their own: they show all that a user of the exported file needs. Arguments: the file,
# a folder with the inputs of each case, how many times the first case is timed, threads.
_RUN_ONNX = """
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
assert "torch" not in sys.modules
names = [x.name for x in session.get_outputs()]

def run(inputs):
    return session.run(names, inputs)
"""
_RUN_TORCHSCRIPT = """
import json, torch, torchvision

torch.set_num_threads(threads)
extra = {"reldn.json": ""}
model = torch.jit.load(file, _extra_files=extra)
about = json.loads(extra["reldn.json"])
names = about["outputs"]

def run(inputs):
    with torch.no_grad():
        return [x.numpy() for x in model(*(torch.from_numpy(inputs[x]) for x in about["inputs"]))]
"""
_PROGRAM = """
import pathlib, sys, time
import numpy as np

file, folder, runs, threads = sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:])
{define_run}
assert not any(name.startswith(("reldn_d2", "detectron2")) for name in sys.modules)
for path in sorted(folder.glob("case*.npz")):
    np.savez(folder / ("output" + path.stem[4:]), **dict(zip(names, run(dict(np.load(path))))))
first, seconds = dict(np.load(folder / "case000.npz")), []
for _ in range(runs):
    start = time.perf_counter(), time.process_time()
    run(first)
    seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
np.save(folder / "seconds", seconds)
"""
_PROGRAMS = {
    "onnx": _PROGRAM.replace("{define_run}", _RUN_ONNX),
    "torchscript": _PROGRAM.replace("{define_run}", _RUN_TORCHSCRIPT),
}

Case = dict[str, np.ndarray]  # the tensors of one image by name


def run_in_new_process(
    path: Path, file_format: str, cases: list[Case], runs: int = 0
) -> tuple[list[Case], np.ndarray]:
    """Run an exported file in a process without this package or Detectron2.

    Args:
        path: of the file.
        file_format: "onnx" or "torchscript".
        cases: inputs by name.
        runs: how many more times the first case is run and timed.

    Returns:
        the outputs of each case by name, and the seconds of each timed run: elapsed, of the CPU.

    Raises:
        ValueError: if the file cannot be run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, case in enumerate(cases):
            np.savez(folder / f"case{i:03}", **case)
        options = [str(path.resolve()), name, str(runs), str(torch.get_num_threads())]
        command = [sys.executable, "-W", "ignore", "-c", _PROGRAMS[file_format], *options]
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {done.returncode}"
            raise ValueError(f"{path} does not run in a new process: {reason}")
        outputs = [dict(np.load(folder / f"output{i:03}.npz")) for i in range(len(cases))]
        return outputs, np.load(folder / "seconds.npy")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="checkpoint of a trained RelDN")
    model.add_argument("--pretrained", metavar="NAME", help="pretrained model, such as vrd_boxes")
    parser.add_argument(
        "--format", choices=list(SAVE), help="default: onnx if OUTPUT ends with .onnx"
    )
    parser.add_argument(
        "--given-boxes",
        action="store_true",
        help="export the relations of given boxes with classes, without the detector",
    )
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help="example images for the check; the first one must show a relation. Not needed by "
        "models that read no pixels",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write, such as reldn.onnx or reldn.ts"
    )
    parser.add_argument("--height", type=int, help="only height of images that the file accepts")
    parser.add_argument("--width", type=int, help="only width (default: any size)")
    parser.add_argument(
        "--runs", type=int, default=0, metavar="N", help="time N runs of the check's first input"
    )
    add_module_argument(parser)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    return parser


def read_images(predictor: RelationPredictor, args: argparse.Namespace) -> list[Tensor]:
    """Read the example images as (3, H, W) inputs: of the fixed size, or in two sizes each."""
    images = []
    for name in args.image:
        rgb = read_rgb(name)
        if args.height:
            sizes = [(args.width, args.height)]
        else:
            height, width = predictor.prepare(rgb)["image"].shape[-2:]
            sizes = [(width, height), (max(3 * width // 4, 1), max(2 * height // 3, 1))]
        for size in sizes:
            resized = np.asarray(Image.fromarray(rgb).resize(size, Image.BILINEAR))
            pixels = from_rgb(resized, predictor.cfg.INPUT.FORMAT).transpose(2, 0, 1)
            images.append(torch.from_numpy(np.ascontiguousarray(pixels)).float())
    return images


def random_entities(count: int, height: int, width: int, num_classes: int) -> list[Tensor]:
    """Return boxes, classes and scores, the same ones in each run."""
    random = np.random.default_rng(count)
    corners = random.random((count, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    classes = random.integers(num_classes, size=count)
    scores = random.random(count)
    return [torch.from_numpy(x) for x in (boxes.astype("float32"), classes, scores.astype("f"))]


def make_cases(graph: ExportedGraph, images: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return inputs of the graph; the first are those that it is traced with."""
    if isinstance(graph, RelDNExport):
        return [(image,) for image in images]
    num_classes = graph.model.detector.num_classes
    cases: list[tuple[Tensor, ...]] = []
    if not graph.reads_images:
        for count in (20, 0, 1, 2, 40):
            entities = random_entities(count, 480, 640, num_classes)
            cases.append((*entities, torch.tensor([480, 640])))
        return cases
    for i, image in enumerate(images):
        for count in (20, 0, 1, 8) if i == 0 else (12,):
            entities = random_entities(count, *image.shape[-2:], num_classes)
            cases.append((image, *entities))
    return cases


def check_file(
    graph: ExportedGraph, cases: list[tuple[Tensor, ...]], path: Path, args: argparse.Namespace
) -> None:
    """Compare a file with the eager model and print the result.

    Raises:
        ValueError: if it does not run or its outputs are others.
    """
    expected = [[x.numpy() for x in graph.model_outputs(*case)] for case in cases]
    expected = [dict(zip(graph.output_names, outputs)) for outputs in expected]
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter(), time.process_time()
        graph.model_outputs(*cases[0])
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    given = [{n: x.numpy() for n, x in zip(graph.input_names, case)} for case in cases]
    found, their_seconds = run_in_new_process(path, args.format, given, args.runs)
    results = [compare_outputs(*outputs) for outputs in zip(expected, found)]
    different = [i for i, result in enumerate(results) if result.problem is not None]
    if different:
        shapes = ", ".join(str(tuple(x.shape)) for x in cases[different[0]])
        raise ValueError(
            f"{path}: NOT the same as the eager model for {len(different)} of {len(cases)} inputs. "
            f"For those of shape {shapes}, {results[different[0]].problem}"
        )
    relations = sum(len(x["pairs"]) for x in found)
    exchanged = sum(result.exchanged for result in results)
    print(
        f"in a new process, {len(cases)} inputs with {relations} relations: the same triplets as "
        f"the eager model{f', {exchanged} exchanged for equal scores' if exchanged else ''}; "
        f"largest difference of a score {max(result.difference for result in results):.1e}"
    )
    if args.runs:
        eager, exported = (1000 * np.median(x, axis=0) for x in (seconds, their_seconds))
        print(
            f"first input, median of {args.runs} runs of each, {torch.get_num_threads()} threads: "
            f"eager {eager[0]:.1f} ms, exported {exported[0]:.1f} ms; of the CPU {eager[1]:.1f} "
            f"and {exported[1]:.1f} ms"
        )


def main(arguments: list[str] | None = None) -> int:
    """Export a model; return the exit status."""
    parser = make_parser()
    args = parse_and_import(parser, arguments)
    if (args.height is None) != (args.width is None):
        parser.error("--height and --width must be given together")
    args.format = args.format or ("onnx" if args.output.suffix == ".onnx" else "torchscript")
    try:
        if args.format == "onnx":
            check_packages()
        check_writable(args.output)
        output = args.output.resolve()
        unchecked = output.with_name(f"{output.name}.unchecked")
        build = RelationPredictor.from_pretrained
        if args.checkpoint:
            build = RelationPredictor.from_checkpoint
        predictor = build(args.checkpoint or args.pretrained, "cpu", opts=args.opts)
        size = (args.height, args.width) if args.height else None
        graph = (GivenBoxesExport if args.given_boxes else RelDNExport)(predictor.model, size)
        if "image" in graph.input_names and not args.image:
            raise ValueError("this model reads pixels: give an example --image")
        if "image" not in graph.input_names and (args.image or size):
            raise ValueError(
                "this model reads no pixels: leave out --image, --height and --width; the image's "
                "size is an input"
            )
        cases = make_cases(graph, read_images(predictor, args))
        SAVE[args.format](
            *(graph, cases[0], unchecked),
            *(predictor.thing_classes, predictor.predicate_classes, predictor.cfg.INPUT.FORMAT),
        )
        shapes = [f"{name} {tuple(x.shape)}" for name, x in zip(graph.input_names, cases[0])]
        size = unchecked.stat().st_size / 1e6
        print(f"{args.output}: {args.format}, {size:.1f} MB, traced with {', '.join(shapes)}")
        check_file(graph, cases, unchecked, args)
        unchecked.replace(output)
    except (ImportError, OSError, ValueError, TypeError) as error:
        print(f"{program_name(__file__)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
