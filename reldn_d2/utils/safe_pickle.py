"""Reading pickles without running code in them.

A pickle can name any function and call it. The readers here know a short list of constructors of
numbers, text, arrays, tensors and plain containers, and refuse a file that names anything else.
"""

import pickle
import zipfile
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch

__all__ = ["ArraysOnlyUnpickler", "Record", "read_pickle"]

_BUILTINS = ("bytearray", "complex", "set")
# The only globals that a pickle of dicts of numpy arrays refers to.
_HARMLESS_GLOBALS = {
    ("_codecs", "encode"),
    # The second module is Python 2's, which protocol 2 writes.
    *((module, name) for module in ("builtins", "__builtin__") for name in _BUILTINS),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
# What torch.save adds for tensors; its storages are read by torch itself.
_TENSOR_GLOBALS = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "Size"),
    ("torch", "device"),
}
_LEGACY_BEGIN = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


class ArraysOnlyUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, numbers, text and numpy arrays; refuse everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


class Record:
    """Stands for an object of another program: its attributes, without its class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise pickle.UnpicklingError("it holds an object whose state is no dict")
        vars(self).update(state)


def read_pickle(path: str, records: Collection[str] = ()) -> Any:
    """Read a pickle or a file of ``torch.save`` without running code in it.

    Args:
        path: the file.
        records: names of classes, without their modules, whose objects become a :class:`Record`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds more than numbers, text, arrays, tensors, plain
            containers and ``records``.
    """
    reader = _pickle_module(frozenset(records))
    try:
        with open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)
            if is_zip and any(
                x.endswith("constants.pkl") for x in zipfile.ZipFile(file).namelist()
            ):
                raise pickle.UnpicklingError("it is a TorchScript archive, which is a program")
            file.seek(0)
            # torch before 1.6 wrote several pickles, the first of which is a magic number.
            is_legacy = file.read(len(_LEGACY_BEGIN)) == _LEGACY_BEGIN
            file.seek(0)
            if is_zip or is_legacy:
                return torch.load(
                    file, map_location="cpu", pickle_module=reader, weights_only=False
                )
            return reader.Unpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is broken or holds more than numbers, text, arrays, tensors and plain "
            "containers. It was not unpickled, because that can run code. "
            f"({str(error).partition(chr(10))[0][:200]})"
        ) from error
    except Exception as error:  # broken pickles fail in many ways
        raise ValueError(
            f"{path} cannot be read as a pickle: it is broken, truncated or in another format. "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
        ) from error


def _pickle_module(records: frozenset[str]) -> ModuleType:
    """Return the module that ``torch.load`` uses instead of Python's ``pickle``."""

    class Unpickler(ArraysOnlyUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name in records:
                return Record
            if (module, name) in _TENSOR_GLOBALS:
                return pickle.Unpickler.find_class(self, module, name)
            return super().find_class(module, name)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = ModuleType("restricted_pickle")
    module.Unpickler, module.load = Unpickler, load
    module.UnpicklingError = pickle.UnpicklingError
    return module
