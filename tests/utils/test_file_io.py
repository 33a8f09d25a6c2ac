"""Atomic writing: what an error, a full disk or an unusual target leaves behind."""

import json
import os
import resource
import stat
import threading
from contextlib import contextmanager

import pytest
import torch

from reldn_d2.utils.file_io import check_writable, write_atomically, write_results


def names(folder):
    return sorted(os.listdir(folder))


@contextmanager
def limited_file_size():
    """Let files grow to 1000 bytes only: writing more fails as on a full disk.

    The limit holds for the whole process, so keep the block short: pytest may write to a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("mode, content", [("w", "naïve\n"), ("wb", b"\0\xff")])
def test_write_atomically_writes_and_replaces(tmp_path, mode, content):
    path = tmp_path / "deep" / "er" / "x.txt"  # folders are created
    for _ in range(2):
        with write_atomically(path, mode) as file:
            file.write(content)
        data = path.read_bytes()
        assert (data if mode == "wb" else data.decode("utf-8")) == content
        assert names(path.parent) == ["x.txt"]


def test_write_atomically_reader_sees_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with write_atomically(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_write_atomically_error_leaves_nothing_behind(tmp_path, error, exists):
    path = tmp_path / "x.txt"
    if exists:
        path.write_text("old")
    with pytest.raises(error), write_atomically(path) as file:
        file.write("half")
        raise error
    assert names(tmp_path) == (["x.txt"] if exists else [])
    assert not exists or path.read_text() == "old"


@pytest.mark.parametrize("size", [5_000, 500_000])  # fails in flush(), or in write()
def test_write_atomically_full_disk_leaves_nothing_behind(tmp_path, size):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="File too large"), limited_file_size():
        with write_atomically(path) as file:
            file.write("x" * size)
    assert names(tmp_path) == ["x.txt"] and path.read_text() == "old"


def test_write_atomically_fsync_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"), write_atomically(tmp_path / "x") as file:
        file.write("x")
    assert names(tmp_path) == []


def test_write_atomically_temporary_file_gone_raises_the_first_error(tmp_path):
    with pytest.raises(ZeroDivisionError), write_atomically(tmp_path / "x"):
        for name in names(tmp_path):
            os.unlink(tmp_path / name)
        raise ZeroDivisionError


def test_write_atomically_target_is_a_folder_raises(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError), write_atomically(tmp_path / "x") as file:
        file.write("x")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == []


def test_write_atomically_parent_is_a_file_raises(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        with write_atomically(tmp_path / "x" / "y") as file:
            file.write("x")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("mode", ["a", "r", "x", "w+"])
def test_write_atomically_other_mode_raises(tmp_path, mode):
    with pytest.raises(ValueError, match="known: w, wb"), write_atomically(tmp_path / "x", mode):
        pass
    assert names(tmp_path) == []


def test_write_atomically_permissions_follow_umask_or_the_old_file(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("old")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        for path in (new, old):
            with write_atomically(path) as file:
                file.write("x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(x.stat().st_mode) for x in (new, old)] == [0o640, 0o640]
    old.chmod(0o604)
    with write_atomically(old) as file:
        file.write("y")
    assert stat.S_IMODE(old.stat().st_mode) == 0o604


def test_write_atomically_symbolic_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "x")
    for content in ("first", "second"):
        with write_atomically(link) as file:
            file.write(content)
        assert link.is_symlink() and (tmp_path / "there" / "x").read_text() == content
    assert names(tmp_path / "there") == ["x"]


def test_write_atomically_pipe_is_written_not_replaced(tmp_path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with write_atomically(pipe) as file:
        file.write("x")
    reader.join(timeout=10)
    assert received == ["x"] and stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_write_atomically_long_name_is_written(tmp_path):
    path = tmp_path / ("x" * 255)  # the longest name that file systems allow
    with write_atomically(path) as file:
        file.write("x")
    assert names(tmp_path) == [path.name]


def test_write_results_writes_null_for_nan(tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results(path, {"task": {"R@50": 12.5, "mR@50": float("nan")}})
    assert json.loads(path.read_text()) == {"task": {"R@50": 12.5, "mR@50": None}}


@pytest.mark.parametrize("save", [lambda f: f.write(b"x" * 5000), lambda f: torch.save(BIG, f)])
def test_write_atomically_full_disk_error_names_the_file(tmp_path, save):
    path = tmp_path / "model.pth"
    with pytest.raises(OSError) as error, limited_file_size():
        with write_atomically(path, "wb") as file:
            save(file)
    assert str(error.value) == f"[Errno 27] File too large: '{path}'"
    assert names(tmp_path) == []


BIG = torch.zeros(5000)


def test_check_writable_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "x.ts")
    assert names(tmp_path) == []
    check_writable("/dev/null")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/deeper'"):
        check_writable(tmp_path / "file" / "deeper" / "x.ts")
    assert names(tmp_path) == ["file"]
