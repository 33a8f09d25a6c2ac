"""The options of programs that predict: the model, its entities, which triplets are written."""

import argparse
from pathlib import Path
from typing import Any

from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained import PRETRAINED, pretrained_file
from reldn_d2.utils.user_modules import add_module_argument

__all__ = [
    *("add_checkpoint_options", "add_model_options", "build_predictor", "checkpoint_path"),
    *("fraction", "positive", "threshold_options", "zero_or_more"),
]


def fraction(text: str) -> float:
    """Parse a command-line value in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    """Parse a positive integer of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def zero_or_more(text: str) -> int:
    """Parse a count of the command line that may be 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def add_checkpoint_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options that name a trained model, and the modules that it needs.

    Args:
        parser: the parser.
        required: whether --checkpoint or --pretrained must be given.
    """
    model = parser.add_mutually_exclusive_group(required=required)
    model.add_argument(
        "--checkpoint", metavar="FILE", help="trained RelDN, such as model_final.pth"
    )
    model.add_argument(
        "--pretrained",
        metavar="NAME",
        help=f"a model that comes with this package ({', '.join(sorted(PRETRAINED))}), or one of "
        "the Hugging Face Hub (hf://OWNER/NAME)",
    )
    parser.add_argument("--config-file", metavar="FILE", help="replaces the checkpoint's config")
    add_module_argument(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`build_predictor` and :func:`.entity_files.read_entities`.

    They must be the last ones that are added, because ``--opts`` takes the remaining words.
    """
    add_checkpoint_options(parser, required=False)
    parser.add_argument(
        "--confidence-threshold",
        type=fraction,
        metavar="SCORE",
        help="min score of a detection; default: the config's, 0.05; of --detector: 0.5",
    )
    parser.add_argument(
        "--min-score",
        type=fraction,
        default=0.01,
        metavar="SCORE",
        help="min score of a triplet; default: 0.01",
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        default=20,
        metavar="K",
        help="number of triplets per image; default: 20",
    )
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="JSON",
        help='boxes that replace detections: {"FILE NAME": {"boxes": [[x0, y0, x1, y1], ...], '
        '"classes": [id or name, ...], "scores": [...]}, ...}; "classes" and "scores" are optional',
    )
    parser.add_argument(
        "--detections",
        type=Path,
        metavar="FILE",
        help="for a model trained on detections from files: COCO results (JSON), whose image ids "
        "are the files' names without suffix; Detectron2's instances_predictions.pth; or JSON as "
        "for --boxes",
    )
    parser.add_argument(
        "--detector",
        metavar="NAME",
        help="detect the entities with this detector: a config of Detectron2's model zoo, such as "
        "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml, the path of a YAML file or LazyConfig, "
        "torchvision:fasterrcnn_resnet50_fpn_v2, or transformers:NAME_OR_FOLDER; classes are "
        "matched by name",
    )
    parser.add_argument(
        "--detector-weights",
        metavar="FILE",
        help="weights of --detector; default: downloaded from the model zoo or torchvision",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images per batch; default: 1"
    )
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE config overrides"
    )


def checkpoint_path(args: argparse.Namespace) -> str | None:
    """Return the file of --checkpoint or --pretrained; None if neither is given."""
    return args.checkpoint if args.pretrained is None else pretrained_file(args.pretrained)


def threshold_options(confidence_threshold: float | None) -> list[Any]:
    """Return the config options of --confidence-threshold for a model with its own detector."""
    if confidence_threshold is None:
        return []
    return [
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", confidence_threshold),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", confidence_threshold),
    ]


def build_predictor(args: argparse.Namespace) -> RelationPredictor:
    """Return the predictor of the command line.

    Raises:
        ValueError: there is no checkpoint.
    """
    opts = list(args.opts)
    path = checkpoint_path(args)
    if path is None and "MODEL.WEIGHTS" in opts:
        path = opts[opts.index("MODEL.WEIGHTS") + 1]
    if path is None:
        raise ValueError(
            "no trained model given: add --checkpoint model_final.pth, or --pretrained "
            f"{' or '.join(sorted(PRETRAINED))}"
        )
    ours = ["TEST.RELATIONS.TOPK", max(args.top_k, 100)]
    ours += threshold_options(args.confidence_threshold)
    # Foreign detectors have classes that the model does not know; boxes of its own do not.
    foreign = args.detector is not None or args.pretrained is not None
    return RelationPredictor.from_checkpoint(
        path,
        args.device,
        args.config_file,
        ours + opts,
        unknown_classes="leave_out" if foreign else "error",
    )
