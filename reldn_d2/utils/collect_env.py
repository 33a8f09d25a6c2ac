"""The environment report for bug reports, which ``python -m reldn_d2.env`` prints."""

import importlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
import torchvision
from tabulate import tabulate

import detectron2
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from . import compat

__all__ = ["environment_rows", "environment_table"]


def environment_table(version: str) -> str:
    """Format everything that a bug report needs as one aligned table."""
    return tabulate(environment_rows(version), tablefmt="plain", disable_numparse=True)


def environment_rows(version: str) -> list[tuple[str, str]]:
    """Return (name, value) rows for the libraries, the hardware and the datasets."""
    return [
        ("reldn_d2", f"{version}, {Path(__file__).parents[1]}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("system", platform.platform()),
        ("torch", f"{torch.__version__}, {_torch_build()}"),
        ("torchvision", f"{torchvision.__version__}, {_torchvision_ops()}"),
        ("Detectron2", f"{_detectron2_source()}, {Path(detectron2.__file__).parent}"),
        ("compiled ops", _compiled_ops()),
        ("patches", ", ".join(compat.applied) or "none needed"),
        ("OpenCV", _module_version("cv2")),
        ("numpy", _module_version("numpy")),
        ("Pillow", _module_version("PIL")),
        ("CPU cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()}"),
        *_gpu_rows(),
        *_dataset_rows(),
    ]


def _module_version(name: str) -> str:
    try:
        return importlib.import_module(name).__version__
    except ImportError as error:
        return f"does not load: {error}"


def _torch_build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if getattr(torch.version, "hip", None):
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA"


def _torchvision_ops() -> str:
    """Try one of torchvision's own ops: they fail if it was built for another torch."""
    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"its ops DO NOT load ({reason}): install the torchvision built for this torch"
    return "its ops load"


def _detectron2_source() -> str:
    """Tell the release 0.6 from the main branch, whose version is 0.6 as well."""
    source = f"{detectron2.__version__}, the release"
    if hasattr(comm, "create_local_process_group"):  # the release has none
        source = f"{detectron2.__version__}, the main branch, commit {_detectron2_commit()}"
    names = metadata.packages_distributions().get("detectron2", [])
    return f"{source}, installed as {names[0]}" if names else source


def _detectron2_commit() -> str:
    """Return the commit that pip noted or that a clone is at, or "unknown".

    Of an installation from a folder (``pip install ./detectron2``) pip notes only the folder, which
    may have been updated since.
    """
    clones = {Path(detectron2.__file__).parents[1]: ""}
    for name in metadata.packages_distributions().get("detectron2", []):
        origin = json.loads(metadata.distribution(name).read_text("direct_url.json") or "{}")
        if "vcs_info" in origin:
            return origin["vcs_info"]["commit_id"]
        if "dir_info" in origin:
            folder = Path(url2pathname(urlparse(origin["url"]).path))
            clones.setdefault(folder, f" (now in {folder}, which it was installed from)")
    for clone, remark in clones.items():
        if (clone / ".git").exists():
            command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
            with suppress(OSError, subprocess.CalledProcessError):
                commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
                return commit.strip() + remark
    return "unknown"


def _compiled_ops() -> str:
    """Say whether ``detectron2._C`` is installed; see :mod:`reldn_d2.utils.compat`."""
    if not compat.has_compiled_ops():
        return "not installed (needed only for deformable convolution and rotated boxes)"
    ops = importlib.import_module("detectron2._C")
    return f"installed, {ops.get_compiler_version()}, CUDA {ops.get_cuda_version()}"


def _gpu_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"))
    return rows


def _dataset_rows() -> list[tuple[str, str]]:
    """Say which registered relation datasets are on disk, and under which root."""
    importlib.import_module("reldn_d2.data.datasets.builtin")  # registers the datasets
    setting = os.environ.get("DETECTRON2_DATASETS")
    root = os.path.abspath(os.path.expanduser(setting or "datasets"))
    rows = [("DETECTRON2_DATASETS", f"{root}{'' if setting else ' (default, not set)'}")]
    for name in sorted(MetadataCatalog.list()):
        metadata = MetadataCatalog.get(name)
        files = metadata.get("annotation_files")
        if files is None or metadata.get("image_root") is None:
            continue  # no relations, or generated by code
        missing = [path for path in (*files, metadata.image_root) if not os.path.exists(path)]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        rows.append((name, f"lacks {missing[0]}{more}" if missing else "found"))
    return rows
