#!/usr/bin/env python
r"""Upload a trained RelDN to the Hugging Face Hub, with a model card.

    hf auth login
    python tools/push_to_hub.py --checkpoint model_final.pth --repository me/my-reldn \
        --results results_sgdet.json --license LICENSE.txt --note "how it was trained"

The repository gets two files: model.safetensors (weights in half precision, names, config, license)
and README.md, the card, which replaces one that is there. RelationPredictor.from_pretrained,
--checkpoint and MODEL.WEIGHTS then take hf://me/my-reldn. Needs: pip install huggingface_hub
safetensors.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
from reldn_d2.checkpoint import write_checkpoint
from reldn_d2.checkpoint.hub_files import (
    HUB_FILE,
    HUB_PREFIX,
    check_repository,
    push_files,
    require_hub,
)
from reldn_d2.checkpoint.safetensors_files import require_safetensors
from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained.model_card import model_card
from reldn_d2.scripts.pack_checkpoint import pack
from reldn_d2.utils.file_io import write_atomically
from reldn_d2.utils.programs import program_help, program_name
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

__all__ = ["main", "write_model"]


def read_results(files: list[Path]) -> dict[str, dict[str, float | None]]:
    """Return the metrics of several ``results_TASK.json`` by task.

    Raises:
        OSError, ValueError: a file cannot be read or is not of that form.
    """
    results: dict[str, dict[str, float | None]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            for task, metrics in content.items():
                numbers = {
                    key: value
                    for key, value in metrics.items()
                    if value is None or isinstance(value, (int, float))
                }
                results.setdefault(task, {}).update(numbers)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"--results {file}: expected {{task: {{metric: value}}}}, as an evaluation writes "
                f"it to results_TASK.json ({error})"
            ) from None
    return results


def write_model(folder: Path, repository: str, content: dict[str, Any], results: dict) -> None:
    """Write the two files of a model, and build the model from them as a check."""
    write_checkpoint(content, folder / HUB_FILE)
    with write_atomically(folder / "README.md") as file:
        file.write(model_card(content, repository, results))
    RelationPredictor.from_checkpoint(folder / HUB_FILE, device="cpu")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as model_final.pth")
    parser.add_argument("--repository", required=True, metavar="OWNER/NAME")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results_TASK.json of evaluations, for the card",
    )
    parser.add_argument(
        "--license",
        type=Path,
        help="text file with the terms of use; default: those in the checkpoint, if it was packed "
        "with them",
    )
    parser.add_argument("--note", default="", help="how the model was trained, for the card")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--message", default="Upload the model", help="of the commit")
    parser.add_argument(
        "--full-precision", action="store_true", help="keep the weights as they are: twice the size"
    )
    parser.add_argument(
        "--only-write", type=Path, metavar="FOLDER", help="write the files there, upload nothing"
    )
    add_module_argument(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Write and upload the files; return the exit status."""
    args = parse_and_import(build_parser(), arguments)
    try:
        check_repository(args.repository)
        if args.only_write:
            require_safetensors(HUB_FILE)
        else:
            require_hub(args.repository)
        results = read_results(args.results)
        license_text = args.license.read_text() if args.license else ""
        content = pack(args.checkpoint, license_text, args.note, args.full_precision)
        if not content["about"]["license"]:
            raise ValueError(
                f"{args.checkpoint} has no terms of use: add --license FILE (the terms of the "
                "training data apply, too)"
            )
        if args.only_write:
            write_model(args.only_write, args.repository, content, results)
            print(f"Wrote {args.only_write}; nothing was uploaded.")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), args.repository, content, results)
            url = push_files(Path(folder), args.repository, args.message, args.private)
    except (ImportError, OSError, ValueError) as error:
        print(f"{program_name(__file__)}: {error}", file=sys.stderr)
        return 1
    print(f"{url}\nRelationPredictor.from_pretrained({HUB_PREFIX + args.repository!r}) reads it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
