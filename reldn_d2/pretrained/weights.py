"""The models whose weights are files of this package."""

from pathlib import Path

__all__ = ["PRETRAINED", "pretrained_file"]

# File in this folder by name. tools/pack_checkpoint.py writes such files; LICENSE.md says where
# each comes from and what it may be used for.
PRETRAINED = {"vrd_boxes": "vrd_boxes.pth.xz"}
FOLDER = Path(__file__).resolve().parent


def pretrained_file(name: str) -> Path:
    """Return the path of a model's weights.

    Raises:
        ValueError: there is no such model; the message lists those that exist.
        FileNotFoundError: the installation lacks the file.
    """
    if name not in PRETRAINED:
        raise ValueError(
            f"there is no pretrained model '{name}'; known: {', '.join(sorted(PRETRAINED))}"
        )
    path = FOLDER / PRETRAINED[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights of '{name}' are missing from this installation ({path}): install "
            "reldn_d2 again"
        )
    return path
