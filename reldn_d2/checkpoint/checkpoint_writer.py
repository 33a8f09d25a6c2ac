"""Writing checkpoint files for inference and exchange; the suffix of the name decides the format.

Checkpoints of a training run, with the optimizer's state, are written by
:class:`.detection_checkpoint.DetectorCheckpointer`.
"""

import io
import lzma
from pathlib import Path
from typing import Any

import torch

from ..utils.file_io import check_writable, write_atomically
from .safetensors_files import require_safetensors, save_safetensors

__all__ = ["check_checkpoint_name", "write_checkpoint"]

SUFFIXES = (".pth", ".pth.xz", ".safetensors")


def check_checkpoint_name(path: str | Path) -> None:
    """Check before long work that :func:`write_checkpoint` can write a file of this name.

    Raises:
        ValueError: the suffix is none of ``SUFFIXES``.
        ImportError: the format needs a package that is not installed.
        OSError: the file cannot be written.
    """
    if not str(path).endswith(SUFFIXES):
        raise ValueError(
            f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    if str(path).endswith(".safetensors"):
        require_safetensors(str(path))
    check_writable(path)


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically, in the format of its suffix.

    Args:
        content: ``"model"`` with weights by name, and entries of plain types such as ``"reldn"``.
        path: ends in ``.pth`` (torch's format), ``.pth.xz`` (the same, compressed) or
            ``.safetensors``.

    Raises:
        ValueError, ImportError, OSError: see :func:`check_checkpoint_name`, or ``.safetensors``
            cannot hold an entry.
    """
    check_checkpoint_name(path)
    if str(path).endswith(".safetensors"):
        save_safetensors(content, path)
        return
    with write_atomically(path, "wb") as file:
        if str(path).endswith(".xz"):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            file.write(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))
        else:
            torch.save(content, file)
