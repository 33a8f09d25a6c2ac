"""The package safetensors in thirty lines, written from the description of the format.

A file is the length of its header (8 bytes, little-endian), the header (JSON) and the values one
after the other. With it the tests of ``.safetensors`` run where the package is missing, and they
check that what it writes and reads is what the format says.
"""

import json
import struct
from contextlib import contextmanager
from types import ModuleType

import torch

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def read_header(data: bytes) -> tuple[dict, bytes]:
    """Return the header and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    assert 8 + length <= len(data), "the header is cut off"
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def save(tensors: dict, metadata: dict | None = None) -> bytes:
    assert all(isinstance(x, str) for pair in (metadata or {}).items() for x in pair)
    header, values = {"__metadata__": metadata or {}}, b""
    for name, x in tensors.items():
        data = x.numpy().tobytes()
        offsets = [len(values), len(values) + len(data)]
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        values += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


class _File:
    def __init__(self, data: bytes):
        self.header, self.values = read_header(data)
        self._metadata = self.header.pop("__metadata__", None)

    def keys(self):
        return list(self.header)

    def metadata(self):
        return self._metadata

    def get_tensor(self, name):
        entry = self.header[name]
        start, end = entry["data_offsets"]
        if start == end:
            return torch.zeros(entry["shape"], dtype=_TYPES[entry["dtype"]])
        flat = torch.frombuffer(bytearray(self.values[start:end]), dtype=_TYPES[entry["dtype"]])
        return flat.reshape(entry["shape"])


@contextmanager
def _safe_open(path, framework):
    assert framework == "pt"
    with open(path, "rb") as file:
        yield _File(file.read())


def install(monkeypatch) -> None:
    """Let ``import safetensors.torch`` give this module's functions until the test ends."""
    package, part = ModuleType("safetensors"), ModuleType("safetensors.torch")
    package.safe_open, package.torch, part.save = _safe_open, part, save
    monkeypatch.setitem(__import__("sys").modules, "safetensors", package)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", part)
