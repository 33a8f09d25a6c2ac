#!/usr/bin/env python
"""Write a small file for inference from a checkpoint of RelDN: half precision.

The name of the output decides the format: .pth.xz is compressed, .safetensors is read by other
programs too (pip install safetensors), .pth is torch's own. The file keeps the weights, the config,
the names of classes and predicates and the predicates per pair, and adds the license (--license)
and how the model was made (--note). It leaves out the optimizer, the training set's statistics and
the paths of the training machine. RelationPredictor.from_checkpoint reads it, and so does
MODEL.WEIGHTS, to evaluate or fine-tune it. A file for RelationPredictor.from_pretrained belongs
into reldn_d2/pretrained and into the table of reldn_d2/pretrained/weights.py.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402  # isort: skip  must be imported before Detectron2
import torch
from torch import Tensor

from reldn_d2.checkpoint import read_checkpoint, write_checkpoint
from reldn_d2.checkpoint.checkpoint_writer import check_checkpoint_name
from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES
from reldn_d2.predictor import RelationPredictor, read_description
from reldn_d2.pretrained.weights import FOLDER
from reldn_d2.utils.programs import program_name
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

from detectron2.config import CfgNode

__all__ = ["main", "pack"]

VRD_LICENSE = FOLDER / "LICENSE.md"
_KEPT = ("thing_classes", "predicate_classes", "predicates_per_pair")
_OF_MODULES = ("config_keys", "modules")  # only of models with parts of the user's
# Files of the training machine; the packed file needs none of them.
_PATHS = {
    "OUTPUT_DIR": "./output",
    "MODEL.WEIGHTS": "",
    "DATASETS.DETECTION_FILES_TRAIN": (),
    "DATASETS.DETECTION_FILES_TEST": (),
}


def without_paths(config: str) -> str:
    """Return the YAML of a config without the paths of the machine that it was trained on."""
    cfg = CfgNode.load_cfg(config)
    for key, value in _PATHS.items():
        node = cfg
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        if last in node:
            node[last] = value
    return cfg.dump()


def to_half(name: str, value: Tensor) -> Tensor:
    """Return a weight in half precision; integers stay.

    Raises:
        ValueError: a finite value is too large for half precision.
    """
    if not value.is_floating_point():
        return value.clone()
    half = value.half()
    if not torch.equal(half.isfinite(), value.isfinite()):
        raise ValueError(f"{name} has values beyond the range of half precision (65504)")
    return half


def pack(
    checkpoint: Path, license_text: str, note: str, full_precision: bool = False
) -> dict[str, Any]:
    """Return what the file holds.

    Args:
        checkpoint: of RelDN, with config and names.
        license_text: terms of use; empty: those in the checkpoint, if it was packed before.
        note: how the model was trained, such as the command; empty likewise.
        full_precision: keep the weights as they are.

    Raises:
        FileNotFoundError, ValueError: it is not a checkpoint of RelDN, or has no config or names.
    """
    description = read_description(str(checkpoint))
    missing = [key for key in ("config", *_KEPT) if not description.get(key)]
    if missing:
        raise ValueError(f"{checkpoint} has no {', '.join(missing)}; train it with this package")
    content = read_checkpoint(str(checkpoint))
    source = content.get("about", {})
    return {
        "model": {
            name: value if full_precision else to_half(name, value)
            for name, value in content["model"].items()
        },
        "reldn": {
            "config": without_paths(description["config"]),
            **{key: description[key] for key in (*_KEPT, *_OF_MODULES) if key in description},
            "attribute_classes": description.get("attribute_classes", []),
        },
        "about": {
            "license": license_text or source.get("license", ""),
            "note": note or source.get("note", ""),
            "source_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            "iteration": content.get("iteration"),
            "reldn_d2": reldn_d2.__version__,
        },
    }


def add_default_license(content: dict[str, Any], is_given: bool) -> str:
    """Add VRD's terms of use to a model of VRD's names that has none.

    Args:
        content: what :func:`pack` returned; changed in place.
        is_given: whether its terms of use are those of ``--license``.

    Returns:
        whose terms the file has, for the user.
    """
    about, names = content["about"], content["reldn"]
    if about["license"]:
        return "of --license" if is_given else "kept from the checkpoint"
    of_vrd = {"thing_classes": VRD_CLASSES, "predicate_classes": VRD_PREDICATES}
    if all(list(names[field]) == list(theirs) for field, theirs in of_vrd.items()):
        about["license"] = VRD_LICENSE.read_text()
        return "VRD's, for research use (--license FILE for another one)"
    return "none (--license FILE adds one)"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as model_final.pth")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file ending in .pth.xz, .safetensors or .pth",
    )
    parser.add_argument(
        "--license",
        type=Path,
        help="text file with the terms of use; default: those in the checkpoint, if it was packed "
        "before; otherwise VRD's for a model of VRD's classes and predicates, none for others",
    )
    parser.add_argument(
        "--full-precision", action="store_true", help="keep the weights as they are: twice the size"
    )
    add_module_argument(parser)
    parser.add_argument("--note", default="", help="how the model was trained, kept in the file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Write the file, read it again and print its size; return the exit status."""
    args = parse_and_import(build_parser(), arguments)
    try:
        check_checkpoint_name(args.output)
        license_text = args.license.read_text() if args.license else ""
        content = pack(args.checkpoint, license_text, args.note, args.full_precision)
        terms = add_default_license(content, bool(license_text))
        write_checkpoint(content, args.output)
        predictor = RelationPredictor.from_checkpoint(args.output, device="cpu")
    except (ImportError, OSError, ValueError) as error:
        print(f"{program_name(__file__)}: {error}", file=sys.stderr)
        return 1
    size = args.output.stat().st_size
    print(
        f"{args.output}: {size / 1e6:.2f} MB, {len(predictor.thing_classes)} classes, "
        f"{len(predictor.predicate_classes)} predicates; license: {terms}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
