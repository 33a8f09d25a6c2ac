"""Pickles are read without running code in them."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch
from foreign_predictions import box_list_class

from reldn_d2.utils.safe_pickle import Record, read_pickle

PLAIN = {"a": [1, 2.5, "x", None, True, b"y"], "b": ({3}, collections.OrderedDict(c=4))}


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save(content, path, container):
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch")
    return str(path)


CONTAINERS = ("pickle", "torch", "torch-legacy")


@pytest.mark.parametrize("container", CONTAINERS)
def test_read_pickle_plain_content(tmp_path, container):
    content = {**PLAIN, "array": np.arange(6.0).reshape(2, 3), "scalar": np.float32(2)}
    again = read_pickle(save(content, tmp_path / "a.pkl", container))
    assert np.array_equal(again.pop("array"), content.pop("array"))
    assert again == content


@pytest.mark.parametrize("container", CONTAINERS[1:])
def test_read_pickle_tensors(tmp_path, container):
    tensors = [torch.arange(4).reshape(2, 2), torch.rand(3)[1:]]
    again = read_pickle(save(tensors, tmp_path / "a.pth", container))
    assert all(torch.equal(x, y) for x, y in zip(again, tensors))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("container", CONTAINERS)
def test_read_pickle_code_is_refused_and_not_run(tmp_path, container, protocol):
    path = tmp_path / "evil.pkl"
    for content in ([Evil(tmp_path / "made")], {"a": (os.mkdir, "x")}, [pickle.Unpickler]):
        if container == "pickle":
            path.write_bytes(pickle.dumps(content, protocol))
        else:
            save(content, path, container)
        with pytest.raises(ValueError, match=r"evil.pkl is broken or .*\(it holds \S+\)") as error:
            read_pickle(str(path), records=["BoxList"])
        assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_read_pickle_records_have_attributes_only(tmp_path, container):
    path = tmp_path / "a.pkl"
    with box_list_class() as cls:
        box_list = cls()
        box_list.size, box_list.extra_fields = (3, 4), {"a": 1}
        save([box_list], path, container)
    (record,) = read_pickle(str(path), records=["BoxList"])
    assert type(record) is Record and record.size == (3, 4) and record.extra_fields == {"a": 1}
    with pytest.raises(ValueError, match="it holds maskrcnn_benchmark.*BoxList"):
        read_pickle(str(path))


def test_read_pickle_record_named_like_a_function_runs_nothing(tmp_path):
    """A class name that is allowed stands for a record, whatever module it is said to be in."""
    opcodes = b"cos\nmkdir\n(X\x04\x00\x00\x00madetR."
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + opcodes)
    assert type(read_pickle(str(tmp_path / "a.pkl"), records=["mkdir"])) is Record
    assert not os.path.exists("made")


def test_read_pickle_torchscript_is_refused(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="TorchScript archive, which is a program"):
        read_pickle(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_read_pickle_truncated_file_raises(tmp_path, container):
    path = tmp_path / "a.pkl"
    save({"a": np.arange(100), **PLAIN}, path, container)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="a.pkl (is broken|cannot be read)"):
        read_pickle(str(path))
    path.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="a.pkl (is broken|cannot be read)"):
        read_pickle(str(path))
    with pytest.raises(FileNotFoundError):
        read_pickle(str(tmp_path / "none.pkl"))


def test_read_pickle_python_2_strings(tmp_path):
    stream = io.BytesIO(b"\x80\x02U\x01\xe9q\x00.")  # protocol 2, a byte string beyond ASCII
    (tmp_path / "a.pkl").write_bytes(stream.getvalue())
    assert read_pickle(str(tmp_path / "a.pkl")) == "é"
