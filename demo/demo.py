#!/usr/bin/env python
r"""Find the relations in images, folders of images and videos with a trained RelDN.

Examples::

    python demo/demo.py --checkpoint model_final.pth --input street.jpg --output pictures
    python demo/demo.py --checkpoint model_final.pth --input photos 'more/*.png' \
        --output out --format json --top-k 100
    python demo/demo.py --checkpoint model_final.pth --video-input walk.mp4 --output walk_out.mp4
    python demo/demo.py --pretrained vrd_boxes --input street.jpg --output pictures \
        --detector COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml

    python demo/demo.py --checkpoint model_final.pth --input photos --output found --format jsonl \
        --workers 4 --batch-size 8

The checkpoint includes its config and class names; --config-file replaces the config. Subfolders of
an input folder are searched with --format jsonl and parquet only. Unusable files are listed at the
end, or in a file, and the exit status is 1; all others are processed. Input files are never
overwritten.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
import numpy as np
from PIL import Image
from tqdm import tqdm

from reldn_d2.bulk import FORMATS, list_images
from reldn_d2.predictor import RelationPredictor
from reldn_d2.scripts.bulk_run import check_bulk_options, run_bulk
from reldn_d2.scripts.entity_files import FileEntities, read_entities
from reldn_d2.scripts.model_options import add_model_options, build_predictor, zero_or_more
from reldn_d2.structures.class_matching import similar_names
from reldn_d2.structures.graph_formats import graph_to_dot, graph_to_graphml
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.file_io import write_atomically
from reldn_d2.utils.image_io import ImageError, distinct_paths, expand_inputs, read_rgb
from reldn_d2.utils.programs import program_help, program_name
from reldn_d2.utils.user_modules import parse_and_import
from reldn_d2.vis.gallery import gallery_record, write_gallery
from reldn_d2.vis.video import EntityTracker, VideoFile, VideoWriter, draw_frame
from reldn_d2.vis.visualizer import RelationVisualizer, heading_of

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
SUFFIXES = {
    "image": _PICTURES,
    "graph": _PICTURES,
    "json": (".json",),
    "graphml": (".graphml", ".xml"),
    "dot": (".dot", ".gv"),
    "html": (".html", ".htm"),
}  # by format: suffixes of a file given as --output; in a folder, results have the first one


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: the options of Detectron2's demo and more."""
    parser = argparse.ArgumentParser(
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="images, globs, folders; with --format jsonl and parquet also lists (.txt), .tar and "
        ".parquet files (docs/bulk.md)",
    )
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera; q quits")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder, or file for a single result; without it, results are shown in a window",
    )
    parser.add_argument(
        "--format",
        choices=["image", "json", "graphml", "dot", "html", "graph", *FORMATS],
        default="image",
        help="pictures; JSON; scene graphs as GraphML, DOT or pictures; one HTML page for all "
        "images; for many images JSON Lines or Parquet (docs/bulk.md); default: image",
    )
    parser.add_argument(
        "--workers",
        type=zero_or_more,
        metavar="N",
        help="with --format jsonl or parquet: processes that read images while the model runs; "
        "0: none; default: 2",
    )
    add_model_options(parser)
    return parser


def prepare_output(output: Path | None, kind: str, files: list[str]) -> dict[str, Path]:
    """Create the output folder and return the output path of each image.

    Args:
        output: as given on the command line; None for a window.
        kind: the format.
        files: the images.

    Raises:
        ValueError: the suffix does not belong to the format, there is one file for several images,
            the folder is not writable, or an input would be overwritten.
    """
    if output is None:
        return dict.fromkeys(files, Path())
    format_of = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
    suffix = output.suffix.lower()
    is_file = suffix in format_of and not output.is_dir()
    if is_file and suffix not in SUFFIXES[kind]:
        raise ValueError(
            f"--output {output}: --format {kind} writes {', '.join(SUFFIXES[kind])}; give such a "
            f"file, a folder, or --format {format_of[suffix]}"
        )
    if is_file and len(files) > 1 and kind != "html":
        raise ValueError(f"--output {output}: there are {len(files)} images; give a folder")
    folder = output.parent if is_file else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output {output}: {folder} cannot be written: {error}") from None
    if is_file or kind == "html":
        paths = dict.fromkeys(files, output if is_file else output / "index.html")
    else:
        paths = distinct_paths(files, output, SUFFIXES[kind][0])
    inputs = {os.path.realpath(file) for file in files}
    for path in paths.values():
        if os.path.realpath(path) in inputs:
            raise ValueError(f"--output {output}: {path} is an input; give another folder or file")
    return paths


def draw(prediction: SceneGraph, args: argparse.Namespace, metadata: Any) -> np.ndarray:
    """Draw the best triplets, on the image or as a graph."""
    visualizer = RelationVisualizer(read_rgb(prediction.file_name), metadata)
    if args.format == "graph":
        best = prediction.best(args.top_k, args.min_score)
        heading = heading_of(best, len(prediction.scores), args.min_score)
        return visualizer.draw_graph(best, heading=heading).get_image()
    return visualizer.draw_predictions(prediction, args.top_k, args.min_score).get_image()


# Formats other than pictures, from the best triplets of an image.
TO_TEXT: dict[str, Callable[[SceneGraph], str]] = {
    "json": lambda best: best.to_json(indent=1) + "\n",
    "graphml": lambda best: graph_to_graphml(best.graph(related_only=True)),
    "dot": lambda best: graph_to_dot(best.graph(related_only=True)),
}


def write_result(
    prediction: SceneGraph, path: Path, args: argparse.Namespace, metadata: Any
) -> None:
    """Write the result of one image in the chosen format."""
    if args.format in TO_TEXT:
        with write_atomically(str(path)) as file:
            file.write(TO_TEXT[args.format](prediction.best(args.top_k, args.min_score)))
    else:
        Image.fromarray(draw(prediction, args, metadata)).save(path)


def run_images(
    predictor: RelationPredictor, paths: dict[str, Path], args: argparse.Namespace
) -> int:
    """Predict all images and return the exit status.

    Args:
        predictor: the model.
        paths: output path by image.
        args: the command line.
    """
    files, metadata = list(paths), predictor.metadata
    errors: list[str] = []
    count = 0
    entities = read_entities(predictor, args)
    if isinstance(entities, FileEntities):
        entities.check_names(files)
    results = predictor.stream(files, batch_size=args.batch_size, given=entities)
    left_out: Counter[str] = Counter()
    progress = tqdm(results, total=len(files), unit="image")

    def predictions() -> Iterator[SceneGraph]:
        for _, prediction in progress:
            if isinstance(prediction, ImageError):
                errors.append(str(prediction))
            else:
                left_out.update(prediction.left_out.values())
                yield prediction

    if args.output is None:
        for prediction in predictions():
            count += 1
            if show(draw(prediction, args, metadata), prediction.file_name, wait=0):
                break
    elif args.format == "html":
        options = dict(topk=args.top_k, min_score=args.min_score)
        records = (
            gallery_record(Path(x.file_name).name, read_rgb(x.file_name), x, metadata, **options)
            for x in predictions()
        )
        count = write_gallery(paths[files[0]], records, "Relations", predictor.predicate_classes)
    else:
        for prediction in predictions():
            write_result(prediction, paths[prediction.file_name], args, metadata)
            count += 1
    where = f" in {args.output}" if args.output else ""
    print(f"{count} of {len(files)} images done{where}")
    print_left_out(left_out, predictor.thing_classes)
    if errors:
        print("\n  ".join([f"{len(errors)} could not be used:", *errors]), file=sys.stderr)
    return 1 if errors else 0


def run_many(args: argparse.Namespace) -> int:
    """Predict images in bulk and return the exit status."""
    check_bulk_options(args)
    images = list_images(args.input)
    predictor = build_predictor(args)
    status, left_out = run_bulk(args, images, predictor)
    print_left_out(left_out, predictor.thing_classes)
    return status


def print_left_out(counts: Counter[str], known: Sequence[str]) -> None:
    """Print how many boxes were left out because the model does not have their classes.

    Args:
        counts: boxes by name of the class.
        known: names of the model's classes.
    """

    def describe(name: str) -> str:
        similar = similar_names(name, known)
        return f"{counts[name]} x {name}" + (f" (did you mean {similar}?)" if similar else "")

    if counts:
        names = ", ".join(describe(name) for name, _ in counts.most_common())
        boxes = "1 box" if counts.total() == 1 else f"{counts.total()} boxes"
        print(f"{boxes} left out, of classes that the model does not have: {names}")


def video_path(args: argparse.Namespace) -> Path:
    """Return the path of the drawn video.

    Raises:
        ValueError: it is the input.
    """
    path = args.output
    if not path.suffix or path.is_dir():
        path = path / f"{'webcam' if args.webcam else Path(args.video_input).stem}.mp4"
    if not args.webcam and os.path.realpath(path) == os.path.realpath(args.video_input):
        raise ValueError(f"--output {path} is the input; give another file")
    return path


def run_video(predictor: RelationPredictor, args: argparse.Namespace) -> int:
    """Predict a video or the camera frame by frame and return the exit status."""
    if args.format != "image" or args.boxes is not None or args.detections is not None:
        raise ValueError("--format, --boxes and --detections are for images, not for videos")
    entities = read_entities(predictor, args)  # raises for a model that needs detections
    left_out: Counter[str] = Counter()
    metadata = predictor.metadata
    tracker = EntityTracker(predictor.thing_classes)
    path = None if args.output is None else video_path(args)
    count, quit_early = 0, False
    with (
        VideoFile(0 if args.webcam else args.video_input) as video,
        nullcontext() if path is None else VideoWriter(path, video.frames_per_second) as writer,
    ):
        for frame in tqdm(video, total=video.count, unit="frame"):
            prediction = predictor(frame, **entities(frame))
            left_out.update(prediction.left_out.values())
            drawn = draw_frame(frame, prediction, tracker, metadata, args.top_k, args.min_score)
            count += 1
            if writer is not None:
                writer.write(drawn)
            elif show(drawn, "relations", wait=1):
                quit_early = True
                break
    print(f"{count} frames done" + (f" in {path}" if path else ""))
    print_left_out(left_out, predictor.thing_classes)
    # Containers may over-report by one frame; a larger gap means a truncated file.
    missing = 0 if quit_early or video.count is None else video.count - count
    if missing > 1:
        print(
            f"{args.video_input}: {missing} of {video.count} frames could not be read: the file is "
            "truncated or broken",
            file=sys.stderr,
        )
    return 1 if missing > 1 else 0


def show(picture: np.ndarray, title: str, wait: int) -> bool:
    """Show a picture in a window; return whether the user wants to quit (q or Escape).

    Raises:
        ValueError: there is no window system.
    """
    import cv2

    try:
        cv2.imshow(title, picture[:, :, ::-1])
        return cv2.waitKey(wait) in (27, ord("q"))
    except cv2.error:
        raise ValueError(
            "no window can be opened by this OpenCV or on this machine: add --output"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    args = parse_and_import(build_parser(), arguments)
    try:
        if args.workers is not None and args.format not in FORMATS:
            raise ValueError("--workers: add --format jsonl or parquet; others use no processes")
        if not args.input:
            return run_video(build_predictor(args), args)
        if args.format in FORMATS:
            return run_many(args)
        paths = prepare_output(args.output, args.format, expand_inputs(args.input))
        return run_images(build_predictor(args), paths, args)
    except (OSError, ValueError, ImportError) as error:
        print(f"{program_name(__file__)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
