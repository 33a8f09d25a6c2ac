#!/usr/bin/env python
r"""Find the relations in images, folders of images and videos, with a trained RelDN.

Examples::

    python demo/demo.py --checkpoint model_final.pth --input street.jpg --output pictures
    python demo/demo.py --checkpoint model_final.pth --input photos 'more/*.png' \
        --output out --format json --top-k 100
    python demo/demo.py --checkpoint model_final.pth --video-input walk.mp4 --output walk_out.mp4

The checkpoint knows its config and the names of its classes; --config-file replaces the config.
Folders give the images in them, not in folders below. A file that cannot be used does not stop the
others: it is listed at the end; the exit status is 1. No input is overwritten.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  bridges gaps before Detectron2 is imported
import numpy as np
from PIL import Image
from tqdm import tqdm

from reldn_d2.predictor import RelationPredictor
from reldn_d2.structures.graph_formats import graph_to_dot, graph_to_graphml
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.image_io import ImageError, distinct_paths, find_images, read_rgb
from reldn_d2.vis.gallery import gallery_record, write_gallery
from reldn_d2.vis.video import EntityTracker, VideoError, VideoFile, VideoWriter, draw_frame
from reldn_d2.vis.visualizer import RelationVisualizer, heading_of

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
SUFFIXES = {
    "image": _PICTURES,
    "graph": _PICTURES,
    "json": (".json",),
    "graphml": (".graphml", ".xml"),
    "dot": (".dot", ".gv"),
    "html": (".html", ".htm"),
}  # by format, those that a file named as --output may have; the first is taken in a folder


def share(text: str) -> float:
    """A number of the command line in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def positive(text: str) -> int:
    """A whole number of the command line, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options: those of Detectron2's demo, and some more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained RelDN, model_final.pth")
    parser.add_argument("--config-file", metavar="FILE", help="in place of the checkpoint's config")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, globs, folders")
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera; q ends")
    parser.add_argument(
        "--output",
        type=Path,
        help="a folder, or a file where there is one result; without it a window shows the results",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=share,
        metavar="SCORE",
        help="least score of a detection; default: the config's, 0.05",
    )
    parser.add_argument(
        "--min-score",
        type=share,
        default=0.01,
        metavar="SCORE",
        help="least score of a triplet; default: 0.01",
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        default=20,
        metavar="K",
        help="the best triplets of an image; default: 20",
    )
    parser.add_argument(
        "--format",
        choices=["image", "json", "graphml", "dot", "html", "graph"],
        default="image",
        help="pictures; JSON; scene graphs as GraphML, DOT or pictures; one HTML page of it all; "
        "default: image",
    )
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="JSON",
        help='boxes in place of detections: {"FILE NAME": {"boxes": [[x0, y0, x1, y1], ...], '
        '"classes": [id or name, ...]}, ...}; classes may be missing',
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images at once; default: 1"
    )
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE config options"
    )
    return parser


def build_predictor(args: argparse.Namespace) -> RelationPredictor:
    """The model of the command line.

    Raises:
        ValueError: no checkpoint was named.
    """
    opts = list(args.opts)
    path = args.checkpoint
    if path is None and "MODEL.WEIGHTS" in opts:
        path = opts[opts.index("MODEL.WEIGHTS") + 1]
    if path is None:
        raise ValueError("name a trained model: --checkpoint model_final.pth")
    ours = ["TEST.RELATIONS.TOPK", max(args.top_k, 100)]
    if args.confidence_threshold is not None:
        ours += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", args.confidence_threshold]
        ours += ["MODEL.RETINANET.SCORE_THRESH_TEST", args.confidence_threshold]
    return RelationPredictor.from_checkpoint(path, args.device, args.config_file, ours + opts)


def read_boxes(path: Path) -> dict[str, dict[str, Any]]:
    """Boxes by file name.

    Raises:
        ImageError: the file is not as ``--boxes`` wants it.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read as JSON: {error}") from None
    good = isinstance(table, dict) and all(
        isinstance(x, dict) and isinstance(x.get("boxes"), list) for x in table.values()
    )
    if not good:
        raise ImageError(f'{path}: expected {{"FILE NAME": {{"boxes": [...], "classes": [...]}}}}')
    return table


def predict_images(
    predictor: RelationPredictor, files: list[str], args: argparse.Namespace
) -> Iterator[tuple[str, SceneGraph | ImageError]]:
    """Each file with its prediction or its error, in order."""
    if args.boxes is None:
        yield from predictor.stream(files, batch_size=args.batch_size)
        return
    table = read_boxes(args.boxes)
    for file in files:
        given = table.get(file) or table.get(Path(file).name)
        try:
            if given is None:
                raise ImageError(f"{file}: {args.boxes} has no boxes for it")
            yield file, predictor(file, boxes=given["boxes"], classes=given.get("classes"))
        except ImageError as error:
            yield file, error


def draw(prediction: SceneGraph, rgb: np.ndarray, args, metadata) -> np.ndarray:
    """A picture of the best triplets, on the image or as a graph."""
    visualizer = RelationVisualizer(rgb, metadata)
    if args.format == "graph":
        best = prediction.best(args.top_k, args.min_score)
        heading = heading_of(best, len(prediction.scores), args.min_score)
        return visualizer.draw_scene_graph(best, heading=heading).get_image()
    return visualizer.draw_scene(prediction, args.top_k, args.min_score).get_image()


def prepare_output(output: Path | None, kind: str, files: list[str]) -> dict[str, Path]:
    """Make the folder of the results; where each image's result goes.

    Args:
        output: as named on the command line; None for a window.
        kind: the format.
        files: the images.

    Raises:
        ValueError: the file's suffix is not one of the format, one file is named for several
            images, the folder cannot be written, or an input would be overwritten.
    """
    if output is None:
        return dict.fromkeys(files, Path())
    format_of = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
    suffix = output.suffix.lower()
    is_file = suffix in format_of and not output.is_dir()
    if is_file and suffix not in SUFFIXES[kind]:
        raise ValueError(
            f"--output {output}: --format {kind} writes {', '.join(SUFFIXES[kind])}; name such a "
            f"file, a folder, or --format {format_of[suffix]}"
        )
    if is_file and len(files) > 1 and kind != "html":
        raise ValueError(f"--output {output}: there are {len(files)} images; name a folder")
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
            raise ValueError(f"--output {output}: {path} is an input; name another folder or file")
    return paths


def write_result(prediction: SceneGraph, path: Path, args, metadata) -> None:
    """Write one image's result in the chosen format."""
    best = prediction.best(args.top_k, args.min_score)
    if args.format in ("image", "graph"):
        picture = draw(prediction, read_rgb(prediction.file_name), args, metadata)
        Image.fromarray(picture).save(path)
    elif args.format == "json":
        path.write_text(best.to_json(indent=1) + "\n", encoding="utf-8")
    else:
        graph = best.graph(related_only=True)
        text = graph_to_dot(graph) if args.format == "dot" else graph_to_graphml(graph)
        path.write_text(text, encoding="utf-8")


def run_images(
    predictor: RelationPredictor, paths: dict[str, Path], args: argparse.Namespace
) -> int:
    """Predict all images; returns the exit status.

    Args:
        predictor: the model.
        paths: of each image, where its result goes.
        args: the command line.
    """
    files, metadata = list(paths), predictor.metadata
    failed: list[str] = []
    done = 0
    progress = tqdm(predict_images(predictor, files, args), total=len(files), unit="image")

    def good() -> Iterator[SceneGraph]:
        for _, prediction in progress:
            if isinstance(prediction, ImageError):
                failed.append(str(prediction))
            else:
                yield prediction

    if args.output is None:
        for prediction in good():
            done += 1
            picture = draw(prediction, read_rgb(prediction.file_name), args, metadata)
            if show(picture, prediction.file_name, wait=0):
                break
    elif args.format == "html":
        names = (predictor.thing_classes, predictor.predicate_classes)
        options = dict(topk=args.top_k, min_score=args.min_score)
        records = (
            gallery_record(Path(x.file_name).name, read_rgb(x.file_name), x, *names, **options)
            for x in good()
        )
        done = write_gallery(paths[files[0]], records, "Relations", predictor.predicate_classes)
    else:
        for prediction in good():
            write_result(prediction, paths[prediction.file_name], args, metadata)
            done += 1
    where = f" in {args.output}" if args.output else ""
    print(f"{done} of {len(files)} images done{where}")
    if failed:
        print(f"{len(failed)} could not be used:", file=sys.stderr)
        for line in failed:
            print(f"  {line}", file=sys.stderr)
    return 1 if failed else 0


def run_video(predictor: RelationPredictor, args: argparse.Namespace) -> int:
    """Predict a video or the camera, frame by frame; returns the exit status."""
    if args.format != "image" or args.boxes is not None:
        raise ValueError("videos are drawn: --format and --boxes are for images")
    metadata = predictor.metadata
    tracker = EntityTracker(predictor.thing_classes)
    with VideoFile(0 if args.webcam else args.video_input) as video:
        writer = None
        if args.output is not None:
            path = args.output
            if not path.suffix or path.is_dir():
                name = "webcam" if args.webcam else Path(args.video_input).stem
                path = path / f"{name}.mp4"
            if not args.webcam and os.path.realpath(path) == os.path.realpath(args.video_input):
                raise ValueError(f"--output {path} is the input; name another file")
            writer = VideoWriter(path, video.frames_per_second)
        count, ended = 0, False
        try:
            for frame in tqdm(video, total=video.count, unit="frame"):
                prediction = predictor(frame)
                drawn = draw_frame(frame, prediction, tracker, metadata, args.top_k, args.min_score)
                count += 1
                if writer is not None:
                    writer.write(drawn)
                elif show(drawn, "relations", wait=1):
                    ended = True
                    break
        finally:
            if writer is not None:
                writer.__exit__()
    print(f"{count} frames done" + (f" in {writer.path}" if writer else ""))
    # Containers may count a frame that is none; more than that is a file that is cut off.
    missing = 0 if ended or video.count is None else video.count - count
    if missing > 1:
        print(
            f"{args.video_input}: it says {video.count} frames, {missing} could not be read: it is "
            "cut off or broken",
            file=sys.stderr,
        )
    return 1 if missing > 1 else 0


def show(picture: np.ndarray, title: str, wait: int) -> bool:
    """Show a picture in a window; whether the user wants to end (q or Escape).

    Raises:
        ValueError: there is no window system.
    """
    import cv2

    try:
        cv2.imshow(title, picture[:, :, ::-1])
        return cv2.waitKey(wait) in (27, ord("q"))
    except cv2.error:
        raise ValueError("this OpenCV or machine has no windows: name an --output") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        if not args.input:
            return run_video(build_predictor(args), args)
        paths = prepare_output(args.output, args.format, find_images(args.input))
        return run_images(build_predictor(args), paths, args)
    except (ImageError, VideoError, OSError, KeyError, ValueError, ImportError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        print(f"demo.py: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
