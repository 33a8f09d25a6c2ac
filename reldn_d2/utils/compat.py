"""Patches that let Detectron2 v0.6 run with current libraries, applied before it is imported.

A patch is applied only if it is needed: the installed Detectron2 uses the name (according to its
source code) and the installed library no longer has it. An official Detectron2 that was built with
its compiled ops and matches its libraries is not patched.

=====================  ===========================================================================
Patch                  Reason
=====================  ===========================================================================
PIL.Image.LINEAR       removed in Pillow 10; a default argument in ``data/transforms``
numpy.int, .float ...  removed in numpy 1.24; without ``numpy.int`` the log silently lacks the
                       table of classes, the others fail when called
detectron2._C          the compiled ops; replaced by a stub whose functions say how to install them
pkg_resources          removed in setuptools 81; imported by ``model_zoo``
loader workers         with the start methods spawn and forkserver they unpickle Detectron2's data
                       sets, which makes them import Detectron2; they import this module first
=====================  ===========================================================================
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
"""Names of the patches applied in this process; empty if none was needed."""


class RemovedName(NamedTuple):
    """A name that Detectron2 v0.6 uses and that newer releases of a library lack."""

    module: str
    name: str
    replacement: str  # "module:name"
    used_in: str  # file of Detectron2 that needs it
    used_as: str  # how the file refers to it


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
    """Apply the patches that the installed Detectron2 needs; calls after the first do nothing.

    Raises:
        ImportError: if Detectron2 or torch is not installed; the message says what to run.
    """
    folder = find_detectron2()
    restore_removed_names(folder)
    replace_missing_compiled_ops()
    with warnings.catch_warnings():  # fvcore and Detectron2 script functions when imported
        # "deprecated", or "not supported" with Python 3.14; the scripted functions work there too.
        warnings.filterwarnings("ignore", "`torch.jit.script` is ", FutureWarning)
        importlib.import_module("detectron2.modeling")
    import_model_zoo_without_pkg_resources(folder)
    if applied and (folder / "data" / "common.py").is_file():
        patch_loader_workers()
    # Detectron2's anchors cause this warning once per process, and a user cannot fix it.
    warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)


def has_compiled_ops() -> bool:
    """Return whether Detectron2's own compiled ops (``detectron2._C``) are installed."""
    return not isinstance(sys.modules["detectron2._C"], _MissingOps)


def set_local_process_group(num_local: int, machine_rank: int) -> None:
    """Tell Detectron2 which processes run on this machine; its ``launch`` does so for GPUs only.

    Args:
        num_local: processes per machine.
        machine_rank: index of this machine, from 0.
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
    """Return the folder of the installed Detectron2 without importing it.

    Raises:
        ImportError: if Detectron2 or torch is not installed.
    """
    spec = importlib.util.find_spec("detectron2")
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))
    if spec is not None and spec.origin is not None and has_torch:
        return Path(spec.origin).parent
    missing = "Detectron2" if has_torch else "torch, torchvision and Detectron2"
    shadow = ""
    if spec is not None and spec.origin is None:  # any folder of that name on the path
        shadow = f" (the folder {list(spec.submodule_search_locations)[0]} is not the package)"
    raise ImportError(
        f"reldn_d2 needs {missing}, which {sys.executable} does not have{shadow}. "
        "In a clone of this repository, `make setup` creates .venv with everything installed. In "
        "your own environment, install torch and torchvision, then Detectron2 with: "
        f"{INSTALL_DETECTRON2}"
    )


def restore_removed_names(folder: Path) -> None:
    """Restore the removed names of Pillow and numpy that Detectron2 in ``folder`` uses."""
    for removed in _REMOVED_NAMES:
        if not _source_has(folder / removed.used_in, removed.used_as):
            continue
        module = importlib.import_module(removed.module)
        with warnings.catch_warnings():  # numpy 1.20 to 1.23 still has them, with a warning
            warnings.simplefilter("ignore")
            present = hasattr(module, removed.name)
        if not present:
            setattr(module, removed.name, pkgutil.resolve_name(removed.replacement))
            applied.append(f"{removed.module}.{removed.name}")


def replace_missing_compiled_ops() -> None:
    """Install a stub as ``detectron2._C`` if the real module cannot be imported."""
    importlib.import_module("detectron2")  # its own import errors are not about the ops
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        if importlib.util.find_spec("detectron2._C") is not None:
            warnings.warn(
                f"Detectron2's compiled ops are installed but do not load ({error}); they were "
                "probably built for another torch. Continuing without them; to rebuild: "
                f"{INSTALL_DETECTRON2} --force-reinstall --no-deps",
                stacklevel=2,
            )
        sys.modules["detectron2._C"] = _MissingOps()
        applied.append("detectron2._C")


def import_model_zoo_without_pkg_resources(folder: Path) -> None:
    """Import ``detectron2.model_zoo`` with a stub for ``pkg_resources`` if that is missing.

    Only Detectron2 sees the stub, which is removed again: other packages that look for
    ``pkg_resources`` still find it missing.
    """
    if not _source_has(folder / "model_zoo" / "model_zoo.py", "pkg_resources"):
        return
    if "detectron2.model_zoo" in sys.modules or importlib.util.find_spec("pkg_resources"):
        return
    for name in ("checkpoint", "config"):  # what model_zoo imports besides detectron2.modeling
        importlib.import_module(f"detectron2.{name}")
    stub = types.ModuleType("pkg_resources")
    stub.resource_filename = _resource_filename
    sys.modules["pkg_resources"] = stub
    try:
        importlib.import_module("detectron2.model_zoo")
    finally:
        del sys.modules["pkg_resources"]
    applied.append("pkg_resources")


def patch_loader_workers() -> None:
    """Make Detectron2's datasets import this module when they are unpickled.

    The start methods spawn and forkserver (the only ones on Windows, the defaults of macOS and of
    Python 3.14) send a loader's dataset to new processes by pickling. Unpickling imports
    Detectron2, which needs the patches.
    """
    common = importlib.import_module("detectron2.data.common")
    data = importlib.import_module("torch.utils.data")
    for value in list(vars(common).values()):
        if isinstance(value, type) and issubclass(value, data.Dataset):
            if value.__module__ == common.__name__:
                value.__reduce_ex__ = _reduce_with_patches
    applied.append("loader workers")


def _reduce_with_patches(self: object, protocol: int) -> tuple:
    """Pickle as any object, but through a function of this module, which is imported first."""
    function, arguments, *state = object.__reduce_ex__(self, protocol)
    return (_call, (function, *arguments), *state)


def _call(function: Callable, *arguments: object) -> object:
    return function(*arguments)


class _MissingOps(types.ModuleType):
    """Stub for ``detectron2._C``; its functions raise an error that says what to install."""

    def __init__(self) -> None:
        super().__init__("detectron2._C", "Stub: Detectron2's compiled ops are not installed.")
        self.__spec__ = ModuleSpec(self.__name__, loader=None)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(_raise_missing_op, name)

    # Detectron2's own environment report calls these three.
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
    """Replace the only function of ``pkg_resources`` that Detectron2 calls."""
    folder = os.path.dirname(importlib.import_module(package).__file__)
    return os.path.join(folder, resource)


def _source_has(path: Path, name: str) -> bool:
    """Return whether the Python file at ``path`` contains ``name`` as a whole dotted name."""
    if not path.is_file():
        return False
    return re.search(rf"\b{re.escape(name)}\b", path.read_text(encoding="utf-8")) is not None


apply()
