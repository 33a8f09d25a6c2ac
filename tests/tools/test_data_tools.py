"""The tools that prepare, split and convert datasets, with a local server and small files."""

import contextlib
import csv
import errno
import http.server
import importlib
import json
import os
import re
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import split_openimages_vrd as split
from data_files import (
    HEADER,
    OPENIMAGES_ROWS,
    pictures,
    write_coco,
    write_csv,
    write_openimages,
    write_visual_genome,
)
from model_utils import ROOT

from reldn_d2.data.datasets import (
    load_openimages_vrd,
    load_visual_genome,
    load_vrd,
    register_relation_instances,
)
from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES
from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def tool(monkeypatch):
    """Imports a script of tools/ or datasets/, calls it with arguments and returns its status."""
    for folder in ("tools", "datasets"):
        monkeypatch.syspath_prepend(str(ROOT / folder))

    def call(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        if hasattr(module, "SOURCES"):  # the prepare scripts
            return importlib.import_module("_prepare").run(module.main)
        return module.main()

    return call


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with byte ranges; the first response for a name in ``cut`` stops halfway."""

    cut: set = set()
    html: set = set()  # folders whose files are sent as web pages
    asked: list = []

    def do_GET(self):  # noqa: N802
        path = Path(self.directory) / self.path.lstrip("/")
        self.asked.append((path.name, self.headers.get("Range")))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if start and start >= len(data):
            return self.send_error(416)
        self.send_response(206 if match else 200)
        kind = "text/html" if path.parent.name in self.html else "application/octet-stream"
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if path.name in self.cut and kind != "text/html":
            self.cut.discard(path.name)
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()

    class FolderHandler(Handler):
        cut, html, asked = set(), set(), []

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FolderHandler) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        FolderHandler.folder, FolderHandler.url = folder, f"http://127.0.0.1:{serving.server_port}"
        yield FolderHandler
        serving.shutdown()


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def vrd_archives(folder):
    entity = {"category": 0, "bbox": [1, 30, 1, 20]}
    other = {"category": 43, "bbox": [11, 40, 6, 50]}
    content = {"a.jpg": [{"predicate": 35, "subject": entity, "object": other}]}
    texts = {
        "annotations_train.json": content,
        "annotations_test.json": content,
        "objects.json": VRD_CLASSES,
        "predicates.json": VRD_PREDICATES,
    }
    zip_of(folder / "json_dataset.zip", {k: json.dumps(v) for k, v in texts.items()})
    image = Path(pictures(folder / "x", ["a.jpg"]), "a.jpg").read_bytes()
    names = [f"sg_dataset/sg_{split}_images/a.jpg" for split in ("train", "test")]
    zip_of(folder / "sg_dataset.zip", {**dict.fromkeys(names, image), "__MACOSX/._a.jpg": b"x"})


def test_prepare_vrd_interrupted_download_resumes(server, tool, tmp_path, capsys):
    vrd_archives(server.folder)
    server.cut.add("sg_dataset.zip")
    arguments = ("prepare_vrd", "--root", tmp_path / "data", "--mirror", server.url)
    assert tool(*arguments) == 1
    error = capsys.readouterr().err
    assert (
        "sg_dataset.zip (the connection ended after " in error
        and "Cannot download" in error
        and "by hand" in error
    )
    part = tmp_path / "data/vrd/sg_dataset.zip.part"
    size = part.stat().st_size
    assert size > 0 and not part.with_suffix("").exists()
    assert tool(*arguments) == 0
    assert ("sg_dataset.zip", f"bytes={size}-") in server.asked
    folder = tmp_path / "data/vrd"
    images = folder / "sg_dataset/sg_train_images"
    (record,) = load_vrd(str(folder / "json_dataset/annotations_train.json"), str(images))
    assert record["relations"] == [(0, 1, 35)]
    assert [path.name for path in images.iterdir()] == ["a.jpg"]
    count = len(server.asked)
    (images / "a.jpg").write_bytes(b"half")  # as if unpacking had been killed
    assert tool(*arguments) == 0 and len(server.asked) == count, "nothing downloaded again"
    assert (images / "a.jpg").stat().st_size > 100
    assert not list(folder.rglob("*.part"))


def test_prepare_vrd_damaged_archive_exits_1(server, tool, tmp_path, capsys):
    vrd_archives(server.folder)
    folder = tmp_path / "data/vrd"
    folder.mkdir(parents=True)
    (folder / "json_dataset.zip").write_bytes(b"no zip")
    assert tool("prepare_vrd", "--root", tmp_path / "data", "--mirror", server.url) == 1
    assert "json_dataset.zip: not a complete zip file" in capsys.readouterr().err


def disk_full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_prepare_vrd_disk_full_leaves_no_part(server, tool, tmp_path, monkeypatch, capsys):
    vrd_archives(server.folder)

    def copy_some(source, target, length):
        target.write(source.read(5))
        disk_full()

    monkeypatch.setattr(importlib.import_module("_prepare").shutil, "copyfileobj", copy_some)
    assert tool("prepare_vrd", "--root", tmp_path / "data", "--mirror", server.url) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "data/vrd").rglob("*.*")] == ["json_dataset.zip"]


def test_prepare_vrd_wrong_archive_exits_1(server, tool, tmp_path, capsys):
    vrd_archives(server.folder)
    zip_of(server.folder / "json_dataset.zip", {"readme.txt": "no"})
    assert tool("prepare_vrd", "--root", tmp_path / "data", "--mirror", server.url) == 1
    assert "annotations_train.json is not in json_dataset.zip" in capsys.readouterr().err


def test_prepare_visual_genome(server, tool, tmp_path):
    arguments = write_visual_genome(server.folder)
    images = sorted(Path(arguments["image_root"]).iterdir())
    zip_of(server.folder / "image_data.json.zip", {"image_data.json": "[]"})
    text = Path(arguments["image_data_file"]).read_text()
    zip_of(server.folder / "image_data.json.zip", {"image_data.json": text})
    for name, part in (("images.zip", images[:2]), ("images2.zip", images[2:])):
        members = {f"VG_100K{name[6:-4]}/{x.name}": x.read_bytes() for x in part}
        zip_of(server.folder / name, members)
    root = tmp_path / "data"
    assert tool("prepare_visual_genome", "--root", root, "--mirror", server.url) == 0
    folder = root / "vg"
    names = ("VG-SGG.h5", "VG-SGG-dicts.json", "image_data.json", "VG_100K")
    assert len(load_visual_genome(*(str(folder / x) for x in names), split="test")) == 2


def serve_openimages(folder, missing=()):
    arguments = write_openimages(folder)
    for name in missing:
        (folder / "train" / name).unlink()
    return arguments


def test_prepare_openimages_own_lists(server, tool, tmp_path, capsys):
    """A missing image is reported at the end; all others are downloaded."""
    serve_openimages(server.folder, ["bb02.jpg"])
    lists = tmp_path / "data/openimages_vrd/lists"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("aa01\nbb02\n")
    (lists / "val.txt").write_text("cc03\n")
    arguments = ("prepare_openimages_vrd", "--root", tmp_path / "data", "--mirror", server.url)
    assert tool(*arguments) == 1
    error = capsys.readouterr().err
    assert "1 of 3 files (train images)" in error and "bb02.jpg: HTTP Error 404" in error
    serve_openimages(server.folder)
    count = len(server.asked)
    assert tool(*arguments) == 0
    assert [name for name, _ in server.asked[count:]] == ["bb02.jpg"]
    folder = tmp_path / "data/openimages_vrd"
    records = load_openimages_vrd(
        str(folder / "challenge-2018-train-vrd.csv"),
        str(folder / "train"),
        str(folder / "challenge-2018-classes-vrd.csv"),
        image_list=str(lists / "train.txt"),
    )
    assert [len(record["relations"]) for record in records] == [2, 1]


def test_prepare_openimages_v6(server, tool, tmp_path):
    arguments = serve_openimages(server.folder)
    Path(arguments["relations_csv"]).rename(server.folder / "oidv6-test-annotations-vrd.csv")
    (server.folder / "train").rename(server.folder / "test")
    root = tmp_path / "data"
    command = ("prepare_openimages_vrd", "--root", root, "--mirror", server.url)
    assert tool(*command, "--set", "v6-test") == 0
    names = sorted(path.name for path in (root / "openimages_vrd/test").iterdir())
    assert names == ["aa01.jpg", "bb02.jpg", "cc03.jpg"]


def test_prepare_openimages_other_predicates_says_which_it_met(server, tool, tmp_path, capsys):
    arguments = serve_openimages(server.folder)
    table = Path(arguments["relations_csv"])
    text = re.sub(",(plays|holds|on|is)\\b", ",rides", table.read_text())
    (server.folder / "oidv6-test-annotations-vrd.csv").write_text(text)
    command = ("prepare_openimages_vrd", "--root", tmp_path, "--mirror", server.url)
    assert tool(*command, "--set", "v6-test") == 1
    assert re.search("no row has one of the predicates at, .* met 'rides'", capsys.readouterr().err)


def sources(tool, *names):
    """Import the prepare scripts and return their tables of sources."""
    return [importlib.import_module(f"prepare_{name}").SOURCES for name in names]


def test_prepare_sources_have_a_page_and_several_addresses(tool):
    for table in sources(tool, "vrd", "visual_genome", "openimages_vrd"):
        for name, source in table.items():
            addresses = source.all_addresses()
            assert len(addresses) >= 2 and len({*addresses}) == len(addresses), name
            assert "https://" in source.page
            for address in addresses:
                url = urllib.parse.urlparse(address)
                assert url.scheme in ("http", "https") and url.netloc
                assert url.path.endswith(f"/{name}") or "id=" in url.query, address
            assert addresses[-1].startswith("https://web.archive.org/")
    (vrd,) = sources(tool, "vrd")
    assert vrd["sg_dataset.zip"].addresses[0] == (
        "https://drive.usercontent.google.com/download?id=0Byvt-AfX75o1SVBTWFlPRGZGTXc"
        "&export=download&confirm=t"
    )


def local_sources(table, monkeypatch, server, *folders):
    """Let each file of a table have one address per folder of a server."""
    for name, source in list(table.items()):
        urls = tuple(f"{server.url}/{folder}/{name}" for folder in folders)
        monkeypatch.setitem(table, name, source._replace(addresses=urls))
        monkeypatch.setattr(type(source), "all_addresses", lambda self: self.addresses)


def test_prepare_vrd_second_address_is_used(server, tool, tmp_path, monkeypatch, capsys):
    (table,) = sources(tool, "vrd")
    local_sources(table, monkeypatch, server, "gone", "page", "copy")
    for name in ("page", "copy"):
        (server.folder / name).mkdir()
    vrd_archives(server.folder / "copy")
    for name in table:  # a host that answers with a page in place of the file
        (server.folder / "page" / name).write_text("<html>this file has moved</html>")
    server.html.add("page")
    server.cut.add("sg_dataset.zip")
    assert tool("prepare_vrd", "--root", tmp_path) == 1
    error = capsys.readouterr().err
    assert "/gone/json_dataset.zip (HTTP Error 404" in error
    assert "/page/json_dataset.zip (the server sent a web page instead of the file)" in error
    assert "/copy/sg_dataset.zip (the connection ended" in error
    assert (tmp_path / "vrd/json_dataset.zip").is_file()
    count = len(server.asked)
    assert tool("prepare_vrd", "--root", tmp_path) == 0
    ranges = [x for _, x in server.asked[count:] if x]
    assert len(ranges) == 1, "only the address that began the file resumes"
    assert not list(tmp_path.rglob("*.part*"))
    assert (tmp_path / "vrd/sg_dataset/sg_test_images/a.jpg").is_file()


def test_prepare_vrd_all_addresses_gone_says_what_to_do(
    server, tool, tmp_path, monkeypatch, capsys
):
    (table,) = sources(tool, "vrd")
    local_sources(table, monkeypatch, server, "gone", "gone_too")
    vrd_archives(server.folder)
    (tmp_path / "vrd").mkdir()
    (server.folder / "json_dataset.zip").rename(tmp_path / "vrd/json_dataset.zip")
    assert tool("prepare_vrd", "--root", tmp_path) == 1
    error = capsys.readouterr().err.split("error: ")[-1]
    assert error.startswith("Cannot download sg_dataset.zip:\n")
    assert error.count("HTTP Error 404") == 2
    for text in (
        "see https://cs.stanford.edu/people/ranjaykrishna/vrd/",
        f"put it into {tmp_path}/vrd as sg_dataset.zip and run the command again",
        "--mirror URL",
        "pip install gdown, then in that folder gdown 0Byvt-AfX75o1SVBTWFlPRGZGTXc -O sg_dataset",
    ):
        assert text in error
    (server.folder / "sg_dataset.zip").rename(tmp_path / "vrd/sg_dataset.zip")  # by hand
    assert tool("prepare_vrd", "--root", tmp_path) == 0


def test_prepare_full_disk_tries_no_other_address(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("_prepare"), "_download", disk_full)
    assert tool("prepare_vrd", "--root", tmp_path) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "next address" not in error


def test_fetch_many_second_address_is_used(server, tool, tmp_path):
    prepare = importlib.import_module("_prepare")
    (server.folder / "b").mkdir()
    (server.folder / "b/1.jpg").write_bytes(b"1")
    addresses = tuple(f"{server.url}/{x}/1.jpg" for x in "ab")
    prepare.fetch_many({tmp_path / "out/1.jpg": addresses}, "images")
    assert (tmp_path / "out/1.jpg").read_bytes() == b"1"
    with pytest.raises(
        prepare.PrepareError, match="1 of 1 files .images.(.|\n)*a/1.jpg: HTTP Error"
    ):
        prepare.fetch_many({tmp_path / "out/2.jpg": addresses[:1]}, "images")


def test_prepare_keyboard_interrupt_exits_130(tool, tmp_path, monkeypatch, capsys):
    prepare = importlib.import_module("_prepare")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_download", stop)
    assert tool("prepare_vrd", "--root", tmp_path) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- splitting


def drawn_predicates(count, seed=0):
    """Images with one to three predicates of very different frequency; the last one is rare."""
    draw = np.random.default_rng(seed)
    weights = np.array([400, 300, 150, 80, 40, 20, 6, 3, 1.0])
    return {
        f"{i:05d}": {
            OPENIMAGES_PREDICATES[p]
            for p in draw.choice(9, draw.integers(1, 4), p=weights / weights.sum())
        }
        for i in range(count)
    }


@pytest.mark.parametrize("size", [9, 100, 1000, 3000])
def test_stratified_sample_keeps_shares(size):
    predicates = drawn_predicates(3000)
    chosen = split.stratified_sample(predicates, size, seed=7)
    assert len(chosen) == len(set(chosen)) == size
    assert chosen == sorted(chosen), "in the order of the data"
    for name in OPENIMAGES_PREDICATES:
        share, whole = (
            sum(name in predicates[image] for image in images) / len(images)
            for images in (chosen, list(predicates))
        )
        assert share > 0
        if size >= 1000:
            assert abs(share - whole) < 0.02
    assert chosen == split.stratified_sample(predicates, size, seed=7)
    backwards = dict(reversed(predicates.items()))
    assert sorted(split.stratified_sample(backwards, size, seed=7)) == chosen, "the order of a file"
    if size < 3000:
        assert chosen != split.stratified_sample(predicates, size, seed=8)


def test_stratified_sample_impossible_size_raises():
    predicates = drawn_predicates(3000)
    for size in (8, 3001):
        with pytest.raises(ValueError, match=f"Cannot draw {size} images: there are 3000"):
            split.stratified_sample(predicates, size, seed=0)
    with pytest.raises(ValueError, match="Image x has no predicate"):
        split.stratified_sample({"x": set()}, 1, seed=0)


def test_split_tool_writes_lists(tool, tmp_path, capsys):
    rows = [
        [image, "/m/01", "/m/02", *["0", "1", "0", "1"] * 2, predicate]
        for image, predicates in drawn_predicates(2000).items()
        for predicate in sorted(predicates)
    ]
    rows += [["attribute", "/m/01", "/m/11", *["0", "1", "0", "1"] * 2, "is"]]
    relations = write_csv(tmp_path / "relations.csv", rows, HEADER)
    sizes = ("--val", 300, "--mini-train", 200, "--mini-val", 100)
    command = ("split_openimages_vrd", "--relations", relations, "--output")
    assert tool(*command, tmp_path / "lists", *sizes) == 0
    lists = {path.stem: path.read_text().split() for path in sorted((tmp_path / "lists").iterdir())}
    assert {name: len(images) for name, images in lists.items()} == {
        "train": 1700,
        "val": 300,
        "mini_train": 200,
        "mini_val": 100,
    }
    assert not set(lists["train"]) & set(lists["val"])
    assert len({*lists["train"], *lists["val"]}) == 2000, "not the image with only attributes"
    for part in ("train", "val"):
        assert set(lists[f"mini_{part}"]) <= set(lists[part])
    assert "| interacts_with |" in capsys.readouterr().out
    assert tool(*command, tmp_path / "again", *sizes) == 0
    for name in lists:
        again = (tmp_path / "again" / f"{name}.txt").read_text().split()
        assert again == lists[name]


ONE_PREDICATE_ROWS = [
    [image, "/m/01", "/m/02", *["0", "1", "0", "1"] * 2, "on"] for image in ("aa01", "bb02")
]


def test_split_tool_invalid_input_exits_1(tool, tmp_path, monkeypatch, capsys):
    relations = write_csv(tmp_path / "relations.csv", OPENIMAGES_ROWS, HEADER)
    command = ("split_openimages_vrd", "--relations", relations, "--output", tmp_path / "lists")
    assert tool(*command) == 1
    assert "error: Cannot draw 3234 images: there are 2 images" in capsys.readouterr().err
    assert not (tmp_path / "lists").exists()
    with monkeypatch.context() as patch:
        patch.setattr("reldn_d2.utils.file_io.os.fsync", disk_full)
        sizes = ("--val", 1, "--mini-train", 1, "--mini-val", 1)
        write_csv(tmp_path / "relations.csv", [*ONE_PREDICATE_ROWS], HEADER)
        assert tool(*command, *sizes) == 1
        assert "No space left on device" in capsys.readouterr().err
        assert not list((tmp_path / "lists").iterdir())
    (tmp_path / "relations.csv").write_text("a,b\n")
    assert tool(*command) == 1
    assert "relations.csv, line 1: no column ImageID" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ converting


@contextlib.contextmanager
def registered(*names):
    yield
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_convert_tool_roundtrip(tool, tmp_path, capsys):
    with registered("to_convert", "converted"):
        arguments = write_coco(tmp_path)
        register_relation_instances("to_convert", {}, **arguments)
        output = tmp_path / "new/converted.json"
        assert (
            tool("convert_to_relation_instances", "--dataset", "to_convert", "--output", output)
            == 0
        )
        assert "2 images, 2 boxes, 3 relations" in capsys.readouterr().out
        register_relation_instances("converted", {}, str(output), arguments["image_root"])
        before, after = DatasetCatalog.get("to_convert"), DatasetCatalog.get("converted")
        assert [x["relations"] for x in after] == [x["relations"] for x in before]
        assert [x["file_name"] for x in after] == [x["file_name"] for x in before]


def test_convert_tool_disk_full_keeps_old_file(tool, tmp_path, monkeypatch, capsys):
    with registered("to_convert"):
        register_relation_instances("to_convert", {}, **write_coco(tmp_path / "data"))
        output = tmp_path / "converted.json"
        output.write_text("old")
        monkeypatch.setattr("reldn_d2.utils.file_io.os.fsync", disk_full)
        command = ("convert_to_relation_instances", "--dataset", "to_convert", "--output", output)
        assert tool(*command) == 1
        assert "error: " in capsys.readouterr().err
        assert output.read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["converted.json", "data"]


def test_convert_tool_unknown_dataset_exits_1(tool, tmp_path, capsys):
    output = tmp_path / "x.json"
    command = ("convert_to_relation_instances", "--output", output, "--dataset")
    assert tool(*command, "vrd_trian") == 1
    assert "Did you mean vrd_train" in capsys.readouterr().err
    assert not output.exists()


def test_write_openimages_official_columns(tmp_path):
    with open(write_openimages(tmp_path)["relations_csv"]) as file:
        assert next(csv.reader(file)) == HEADER and len(HEADER) == 12
