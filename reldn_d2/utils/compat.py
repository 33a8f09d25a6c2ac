"""Bridges between Detectron2 v0.6 and today's libraries, laid before Detectron2 is imported.

Each bridge is laid only where its gap is there: the installed Detectron2 uses the name (its own
source says so) and the installed library no longer has it. An official Detectron2 that was built
with its compiled ops and fits its libraries gets none.

=====================  ===================================================================
Bridge                 Gap
=====================  ===================================================================
PIL.Image.LINEAR       removed from Pillow 10; default argument in ``data/transforms``
numpy.int, .float ...  removed from numpy 1.24; without ``numpy.int`` the table of classes is
                       left out of the log without a word, the others fail when called
detectron2._C          the compiled ops; a stand-in whose functions say how to get them
pkg_resources          removed from setuptools 81; imported by ``model_zoo``
=====================  ===================================================================
"""

import functools
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple, NoReturn

__all__ = ["applied", "apply", "has_compiled_ops", "set_local_process_group"]

INSTALL_DETECTRON2 = (
    "pip install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"
)

applied: list[str] = []
"""Names of the bridges that were laid in this process; empty where none was needed."""


class RemovedName(NamedTuple):
    """A name that Detectron2 v0.6 uses and newer releases of its library lack."""

    module: str
    name: str
    stand_in: str  # what to give in its place
    used_in: str  # file of Detectron2 that needs it
    used_as: str


_REMOVED_NAMES = (
    RemovedName(
        "PIL.Image", "LINEAR", "PIL.Image:BILINEAR", "data/transforms/transform.py", "Image.LINEAR"
    ),
    RemovedName("numpy", "int", "builtins:int", "data/build.py", "np.int"),
    RemovedName("numpy", "bool", "builtins:bool", "structures/masks.py", "np.bool"),
    RemovedName("numpy", "float", "builtins:float", "evaluation/sem_seg_evaluation.py", "np.float"),
    RemovedName("numpy", "str", "builtins:str", "data/datasets/pascal_voc.py", "np.str"),
)


def apply() -> None:
    """Lays the bridges that the installed Detectron2 needs; calls after the first do nothing.

    Raises:
        ImportError: Detectron2 or torch is not installed; the message says what to run.
    """
    folder = find_detectron2()
    restore_removed_names(folder)
    stand_in_for_compiled_ops()
    with warnings.catch_warnings():  # fvcore and Detectron2 script functions when imported
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        importlib.import_module("detectron2.modeling")
    import_model_zoo_without_pkg_resources(folder)
    # Of Detectron2's anchors, once in every process; there is nothing that a user could do.
    warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)


def has_compiled_ops() -> bool:
    """Whether Detectron2's own compiled ops (``detectron2._C``) are there."""
    return not isinstance(sys.modules["detectron2._C"], _MissingOps)


def set_local_process_group(num_local: int, machine_rank: int) -> None:
    """Tells Detectron2 which processes are on this machine; its ``launch`` does so for GPUs only.

    Args:
        num_local: processes of each machine.
        machine_rank: number of this machine.
    """
    comm = importlib.import_module("detectron2.utils.comm")
    if hasattr(comm, "create_local_process_group"):  # Detectron2's main branch
        comm.create_local_process_group(num_local)
        return
    dist = importlib.import_module("torch.distributed")
    for machine in range(dist.get_world_size() // num_local):
        ranks = list(range(machine * num_local, (machine + 1) * num_local))
        group = dist.new_group(ranks)
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group


def find_detectron2() -> Path:
    """Returns the folder of the installed Detectron2 without importing it.

    Raises:
        ImportError: it, or torch, is not installed.
    """
    spec = importlib.util.find_spec("detectron2")
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))
    if spec is not None and spec.origin is not None and has_torch:
        return Path(spec.origin).parent
    lacking = "Detectron2" if has_torch else "torch, torchvision and Detectron2"
    shadow = ""
    if spec is not None and spec.origin is None:  # any folder of that name on the path
        shadow = f" (the folder {list(spec.submodule_search_locations)[0]} is not the package)"
    raise ImportError(
        f"reldn_d2 needs {lacking}, which {sys.executable} does not have{shadow}. "
        "In a clone of this repository, `make setup` makes an environment with all of it in "
        ".venv. In your own environment, install torch and torchvision, then Detectron2 with: "
        f"{INSTALL_DETECTRON2}"
    )


def restore_removed_names(folder: Path) -> None:
    """Gives removed names back to Pillow and numpy where Detectron2 in ``folder`` uses them."""
    for gap in _REMOVED_NAMES:
        if not _source_has(folder / gap.used_in, gap.used_as):
            continue
        module = importlib.import_module(gap.module)
        with warnings.catch_warnings():  # numpy 1.20 to 1.23 still have theirs, with a warning
            warnings.simplefilter("ignore")
            present = hasattr(module, gap.name)
        if not present:
            setattr(module, gap.name, pkgutil.resolve_name(gap.stand_in))
            applied.append(f"{gap.module}.{gap.name}")


def stand_in_for_compiled_ops() -> None:
    """Puts a stand-in at ``detectron2._C`` if the real module cannot be imported."""
    importlib.import_module("detectron2")  # its own errors are not about the ops
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        if importlib.util.find_spec("detectron2._C") is not None:
            warnings.warn(
                f"Detectron2's compiled ops are there but do not load ({error}); they were "
                "probably built for another torch. Going on without them; to rebuild: "
                f"{INSTALL_DETECTRON2} --force-reinstall --no-deps",
                stacklevel=2,
            )
        sys.modules["detectron2._C"] = _MissingOps()
        applied.append("detectron2._C")


def import_model_zoo_without_pkg_resources(folder: Path) -> None:
    """Imports ``detectron2.model_zoo`` with a stand-in for ``pkg_resources`` if that is missing.

    Only Detectron2 sees the stand-in: it is taken away again, so that other packages that ask
    for ``pkg_resources`` find it missing, as it is.
    """
    if not _source_has(folder / "model_zoo" / "model_zoo.py", "pkg_resources"):
        return
    if "detectron2.model_zoo" in sys.modules or importlib.util.find_spec("pkg_resources"):
        return
    for name in ("checkpoint", "config"):  # what model_zoo imports, beside detectron2.modeling
        importlib.import_module(f"detectron2.{name}")
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_filename = _resource_filename
    sys.modules["pkg_resources"] = stand_in
    try:
        importlib.import_module("detectron2.model_zoo")
    finally:
        del sys.modules["pkg_resources"]
    applied.append("pkg_resources")


class _MissingOps(types.ModuleType):
    """Stand-in for ``detectron2._C``; its functions raise a sentence that says what to do."""

    def __init__(self) -> None:
        super().__init__("detectron2._C", "Stand-in: Detectron2's compiled ops are not installed.")
        self.__spec__ = ModuleSpec(self.__name__, loader=None)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(_raise_missing_op, name)

    # What Detectron2's own environment report asks for.
    def get_compiler_version(self) -> str:
        return "compiled ops not installed"

    def get_cuda_version(self) -> str:
        return "compiled ops not installed"

    def has_cuda(self) -> bool:
        return False


def _raise_missing_op(op_name: str, *args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(
        f"detectron2._C.{op_name} is one of Detectron2's compiled ops (deformable convolution, "
        "rotated boxes, fast COCO evaluation), which are not installed. To use it, install "
        f"Detectron2 from source with a C++ compiler: {INSTALL_DETECTRON2}"
    )


def _resource_filename(package: str, resource: str) -> str:
    """The one function of ``pkg_resources`` that Detectron2 calls."""
    folder = os.path.dirname(importlib.import_module(package).__file__)
    return os.path.join(folder, resource)


def _source_has(path: Path, name: str) -> bool:
    """Whether the Python file at ``path`` speaks of ``name`` (as a whole dotted name)."""
    if not path.is_file():
        return False
    return re.search(rf"\b{re.escape(name)}\b", path.read_text(encoding="utf-8")) is not None


apply()
