"""Checkpoints on the Hugging Face Hub: ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.

A model is one file, ``model.safetensors`` (:mod:`.safetensors_files`), and a model card, README.md.
Detectron2's path manager learns ``hf://``, so that a model of the hub works wherever a checkpoint
is read: ``MODEL.WEIGHTS``, ``--checkpoint``, ``RelationPredictor``.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from iopath.common.file_io import PathHandler

from detectron2.utils.file_io import PathManager

from .safetensors_files import require_safetensors

__all__ = ["HUB_FILE", "HUB_PREFIX", "check_repository", "push_files", "require_hub"]

HUB_PREFIX = "hf://"
HUB_FILE = "model.safetensors"
_REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


def require_hub(name: str) -> ModuleType:
    """Import huggingface_hub, and check that its files can be read.

    Args:
        name: of the model, for the message.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name} needs huggingface_hub ({error}): pip install huggingface_hub safetensors"
        ) from error
    require_safetensors(name)
    return huggingface_hub


def check_repository(name: str) -> None:
    """Check the name of a repository, ``OWNER/NAME``.

    Raises:
        ValueError: it is not of that form.
    """
    if not re.fullmatch(_REPOSITORY, name):
        raise ValueError(f"'{name}' is not the name of a repository: expected OWNER/NAME")


def download(path: str) -> str:
    """Download a model, or find it in the cache of huggingface_hub.

    Args:
        path: ``hf://OWNER/NAME``, with ``@REVISION`` for a branch, tag or commit.

    Returns:
        the path of the local file.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
        ValueError: ``path`` is not of that form.
        FileNotFoundError: there is no such model, or no network and no copy in the cache.
    """
    match = re.fullmatch(rf"{HUB_PREFIX}({_REPOSITORY})(?:@([\w./-]+))?", path)
    if match is None:
        raise ValueError(
            f"'{path}' is not the name of a model: expected hf://OWNER/NAME[@REVISION]"
        )
    hub = require_hub(path)
    try:
        return hub.hf_hub_download(match[1], HUB_FILE, revision=match[2])
    # The library raises errors of many types, and its HTTP library more.
    except Exception as error:
        raise FileNotFoundError(_reason(error)) from error


def push_files(folder: Path, repository: str, message: str, private: bool = False) -> str:
    """Upload a folder as one commit; the repository is created if necessary.

    Args:
        folder: its files are uploaded.
        repository: ``OWNER/NAME``.
        message: of the commit.
        private: of a new repository.

    Returns:
        the address of the commit.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
        OSError: no network, no permission or no token; the message is one line.
    """
    api = require_hub(repository).HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=message
        )
    except Exception as error:  # see above
        raise OSError(
            f"{HUB_PREFIX}{repository} could not be written: {_reason(error)}. Uploading needs "
            "network access and a token with write access (hf auth login, or HF_TOKEN)."
        ) from error
    return str(getattr(commit, "commit_url", commit))


def _reason(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


class HubPathHandler(PathHandler):
    """Detectron2's path manager opens ``hf://`` with it."""

    def _get_supported_prefixes(self) -> list[str]:
        return [HUB_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return download(path)


PathManager.register_handler(HubPathHandler(), allow_override=True)
