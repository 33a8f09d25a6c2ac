"""The images of folders, lists, tar and Parquet files, and their keys."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from usage_utils import picture

from reldn_d2.bulk.image_sources import ImageItem, ImageReader, list_images
from reldn_d2.utils.image_io import ImageError


def png(seed: int = 0) -> bytes:
    """Return the content of a PNG file of ``picture(seed=seed)``."""
    file = io.BytesIO()
    Image.fromarray(picture(seed=seed)).save(file, "png")
    return file.getvalue()


def write(path, content: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tar(path, members, suffix: str = ""):
    with tarfile.open(path, f"w{suffix}") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, columns, **options):
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path, **options)
    return path


def test_list_images_folder_gives_relative_keys_of_subfolders(tmp_path):
    for name in ("b.jpg", "a/x.png", "b/x.PNG", "b/ü 中.jpg", "notes.txt", "b/data.tar"):
        write(tmp_path / "photos" / name)
    images = list_images([tmp_path / "photos"])
    assert [x.key for x in images] == ["b.jpg", "a/x.png", "b/x.PNG", "b/ü 中.jpg"]
    assert images[1] == ImageItem("a/x.png", str(tmp_path / "photos/a/x.png"))


def test_list_images_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "other/a.jpg")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.jpg").symlink_to("nowhere")  # listed, so that its reason is reported
    assert [x.key for x in list_images([folder])] == ["gone.jpg", "link/a.jpg"]


def test_list_images_same_file_twice_is_listed_once(tmp_path):
    file = write(tmp_path / "photos/a.jpg")
    assert len(list_images([file.parent, file, str(file.parent / "*.jpg")])) == 1


def test_list_images_list_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/all.txt").write_text("a.jpg\n\n/data/ü.jpg\n", encoding="utf-8")
    images = list_images(["lists/all.txt", "b.jpg"])
    assert images[0] == ImageItem("a.jpg", "lists/a.jpg")
    assert images[1:] == [ImageItem("/data/ü.jpg", "/data/ü.jpg"), ImageItem("b.jpg", "b.jpg")]


def test_list_images_list_with_mark_and_odd_names(tmp_path):
    names = ["a.jpg", "b\u2028c\x0cd\x85.jpg", "e.jpg"]
    text = "\ufeff" + "\r\n".join(names)
    (tmp_path / "all.txt").write_bytes(text.encode())
    assert [x.key for x in list_images([tmp_path / "all.txt"])] == names


@pytest.mark.parametrize(
    "inputs, message",
    [
        (["EMPTY"], "empty: no image in this folder and its subfolders .* 'shards/"),
        (["EMPTY/*.jpg"], "no file matches"),
        (["EMPTY/none.txt"], "none.txt: cannot be read as a list of paths"),
        (["EMPTY/none.tar"], "none.tar: cannot be read as a tar file"),
        (["ROOT/photos", "ROOT/more"], "two images have the key 'a.jpg' .*more/a.jpg.*give the"),
        (["ROOT/cut_content.tar"], "cut_content.tar: cannot be read as a tar file: unexpected en"),
        (["ROOT/cut_header.tar"], "cut_header.tar: cannot be read as a tar file: it is cut off"),
        (["ROOT/cut_end.tar"], "cut_end.tar: cannot be read as a tar file: it is cut off"),
        (["ROOT/two.tar"], "two.tar: .* after its end there is more, such as a second archive"),
        (["ROOT/texts.tar"], "texts.tar: no image in this tar file"),
        (["ROOT/twice.tar"], "two images have the key '.*twice.tar/a.png' .* at "),
        (["ROOT/packed.tar.gz"], "packed.tar.gz: a compressed tar file .* uncompress it first"),
        (["ROOT/bytes.txt"], "bytes.txt: cannot be read as a list of paths in UTF-8"),
    ],
)
def test_list_images_unusable_input_raises_one_line(inputs, message, tmp_path):
    padded = -(-len(png()) // 512) * 512
    (tmp_path / "empty").mkdir()
    write(tmp_path / "photos/a.jpg")
    write(tmp_path / "more/a.jpg")
    write(tmp_path / "bytes.txt", b"\xff\xfe")
    whole = write_tar(tmp_path / "whole.tar", {"a.png": png(), "b.png": png(1)}).read_bytes()
    for name, end in (("content", 900), ("header", 512 + padded + 99), ("end", 512 + padded)):
        write(tmp_path / f"cut_{name}.tar", whole[:end])
    write(tmp_path / "two.tar", 2 * whole)
    write_tar(tmp_path / "texts.tar", {"a.txt": b"x"})
    write_tar(tmp_path / "packed.tar.gz", {"a.png": png()}, ":gz")
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"))
    names = {"EMPTY": str(tmp_path / "empty"), "ROOT": str(tmp_path)}
    for short, name in names.items():
        inputs = [x.replace(short, name) for x in inputs]
    with pytest.raises(ImageError, match=message) as error:
        list_images(inputs)
    assert "\n" not in str(error.value)


def test_image_reader_tar_members(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(3), "a.json": b"{}", "sub/b.png": b"text"})
    good, bad = list_images([path])
    assert [good.key, bad.key] == [f"{path}/a.png", f"{path}/sub/b.png"]
    read = ImageReader()
    assert np.array_equal(read(good), picture(seed=3))
    with pytest.raises(ImageError, match="sub/b.png: cannot be read .* its content is not an im"):
        read(bad)
    path.unlink()
    with pytest.raises(ImageError, match="a.png: .*0.tar cannot be read: .*No such file"):
        read(good)


def test_image_reader_links_in_a_tar_file(tmp_path):
    path = tmp_path / "links.tar"
    links = (
        *(("sub/b.png", tarfile.LNKTYPE, "a.png"), ("sub/c.png", tarfile.SYMTYPE, "../a.png")),
        *(("d.png", tarfile.SYMTYPE, "none.png"), ("e.png", tarfile.LNKTYPE, "d.png")),
    )
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(png(3))
        archive.addfile(info, io.BytesIO(png(3)))
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    images = list_images([path])
    assert [x.key for x in images] == [f"{path}/{x}" for x in ("a.png", *(x[0] for x in links))]
    read = ImageReader()
    assert all(np.array_equal(read(x), picture(seed=3)) for x in images[:3])
    for image in images[3:]:
        with pytest.raises(ImageError, match="this member is sparse, or a link to a file that is"):
            read(image)


def test_image_reader_name_that_is_not_utf8_raises(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        with open(path, "wb") as file:
            file.write(png())
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    (image,) = list_images([tmp_path])
    with pytest.raises(ImageError, match="this path is not UTF-8; rename it"):
        ImageReader()(image)


@pytest.mark.parametrize("with_struct", [False, True])
def test_image_reader_parquet_rows_in_any_order(with_struct, tmp_path):
    contents = [png(i) for i in range(45)]
    contents[7] = None
    column = [None if x is None else {"bytes": x, "path": None} for x in contents]
    path = write_parquet(
        tmp_path / "a.parquet", {"image": column if with_struct else contents}, row_group_size=20
    )
    images = list_images([path])
    assert [x.key for x in images[:2]] == [f"{path}/0", f"{path}/1"] and len(images) == 45
    read = ImageReader()
    for row in (0, 1, 6, 19, 20, 44, 43, 3, 25):
        assert np.array_equal(read(images[row]), picture(seed=row))
    with pytest.raises(ImageError, match="/7: .*row 7 of the column 'image' has no content"):
        read(images[7])


def test_list_images_parquet_keys_and_paths(tmp_path):
    with_keys = write_parquet(tmp_path / "k.parquet", {"image": [png()] * 2, "key": [17, 18]})
    assert [x.key for x in list_images([with_keys])] == ["17", "18"]
    with_paths = write_parquet(tmp_path / "p.parquet", {"path": ["x/a.jpg", "/data/b.jpg"]})
    assert list_images([with_paths]) == [
        ImageItem("x/a.jpg", str(tmp_path / "x/a.jpg")),
        ImageItem("/data/b.jpg", "/data/b.jpg"),
    ]
    for columns, message in (
        ({"pixels": [b"x"]}, "neither a column 'image' .* nor 'path'"),
        ({"image": [b"x", b"y"], "key": ["a", None]}, "row 1 has no key"),
        ({"image": [b"x", b"y"], "key": ["a", "a"]}, "two images have the key 'a'"),
    ):
        with pytest.raises(ImageError, match=message):
            list_images([write_parquet(tmp_path / "bad.parquet", columns)])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImageError, match="bad.parquet: cannot be read as Parquet: "):
        list_images([tmp_path / "bad.parquet"])
