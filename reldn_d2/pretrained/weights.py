"""Pretrained models by name: files of this package, and models of the Hugging Face Hub."""

from pathlib import Path

from ..checkpoint.hub_files import HUB_PREFIX

__all__ = ["PRETRAINED", "pretrained_file"]

# File in this folder by name. tools/pack_checkpoint.py writes such files; LICENSE.md says where
# each comes from and what it may be used for.
PRETRAINED = {"vrd_boxes": "vrd_boxes.pth.xz"}
FOLDER = Path(__file__).resolve().parent


def pretrained_file(name: str) -> Path | str:
    """Return where the weights of a model are, as ``RelationPredictor.from_checkpoint`` takes it.

    Args:
        name: a key of ``PRETRAINED``, whose path is returned, or ``hf://OWNER/NAME[@REVISION]``,
            which is returned as it is.

    Raises:
        ValueError: there is no such model; the message lists those that exist.
        FileNotFoundError: the installation lacks the file.
    """
    if name.startswith(HUB_PREFIX):
        return name
    if name not in PRETRAINED:
        raise ValueError(
            f"there is no pretrained model '{name}'; known: {', '.join(sorted(PRETRAINED))}, and "
            "hf://OWNER/NAME for a model of the Hugging Face Hub"
        )
    path = FOLDER / PRETRAINED[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights of '{name}' are missing from this installation ({path}): install "
            "reldn_d2 again"
        )
    return path
