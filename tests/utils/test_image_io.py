"""Images of every color space, depth and orientation, and files that are not images."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile
from usage_utils import picture

from reldn_d2.utils.image_io import (
    ImageError,
    expand_inputs,
    pil_to_rgb,
    read_image,
    read_rgb,
    to_rgb,
)

from detectron2.data import detection_utils


def near(first, second, most=3):
    return np.abs(first.astype(int) - second.astype(int)).mean() < most


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "LA", "P", "1", "YCbCr"])
def test_read_rgb_converts_color_spaces(mode, tmp_path):
    rgb = picture()
    image = Image.fromarray(rgb).convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr", "L") else "x.png")
    image.save(path, **({"quality": 98} if path.suffix == ".jpg" else {}))
    found = read_rgb(path)
    assert found.shape == rgb.shape and found.dtype == np.uint8
    expected = np.asarray(Image.fromarray(rgb).convert(mode).convert("RGB"))
    assert near(found, expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_read_rgb_sixteen_bits_are_scaled(suffix, tmp_path):
    gray = np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / f"x{suffix}")
    found = read_rgb(tmp_path / f"x{suffix}")
    assert near(found, np.repeat((gray / 257)[:, :, None], 3, axis=2), most=1)


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize(
    "mode, suffix",
    [("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"), ("RGB", "bmp")]
    + [(mode, "jpg") for mode in ("RGB", "L", "CMYK")],
)
def test_read_image_eight_bits_equals_detectron2(mode, suffix, image_format, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"x.{suffix}"
    upright = {} if suffix == "bmp" else {"exif": exif}
    Image.fromarray(picture(61, 90)).convert(mode).save(path, **upright)
    found, expected = (
        reader(str(path), image_format) for reader in (read_image, detection_utils.read_image)
    )
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert found.shape[:2] == ((61, 90) if suffix == "bmp" else (90, 61))


def test_read_rgb_float_tiff_is_scaled(tmp_path):
    ramp = np.linspace(0, 1, 60 * 90, dtype=np.float32).reshape(60, 90)
    for white in (1, 255, 65535):
        Image.fromarray(ramp * white).save(tmp_path / "x.tif")
        found = read_rgb(tmp_path / "x.tif")
        assert np.array_equal(found, np.repeat((ramp * 255).round()[:, :, None], 3, axis=2))
        assert np.array_equal(found, to_rgb(ramp * white))
    ramp[3, 3] = np.nan
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="x.tif: the image has values that are not finite"):
        read_rgb(tmp_path / "x.tif")


def test_read_rgb_too_many_pixels_raises(tmp_path, monkeypatch):
    Image.fromarray(picture(200, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 29_000)
    with pytest.raises(ImageError, match=r"x\.png: the image has more than 0 megapixels") as error:
        read_rgb(tmp_path / "x.png")
    assert "scale it (and its boxes) down" in str(error.value) and "\n" not in str(error.value)


def test_pil_to_rgb_truncated_raises(tmp_path):
    Image.fromarray(picture(200, 300)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    with Image.open(io.BytesIO(content[: len(content) // 2])) as image:
        with pytest.raises(ImageError, match="^image 2: cannot be read as an image: .*truncated"):
            pil_to_rgb(image, "image 2")


def test_read_rgb_transparent_pixels_are_white(tmp_path):
    rgba = np.dstack([picture(), np.full((60, 90), 255, np.uint8)])
    rgba[:30, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "x.png")
    for found in (read_rgb(tmp_path / "x.png"), to_rgb(rgba)):
        assert (found[:30] == 255).all() and np.array_equal(found[30:], rgba[30:, :, :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_rgb_applies_exif_orientation(orientation, tmp_path):
    upright = picture(60, 90)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo it
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "x.png"), upright)


@pytest.mark.parametrize(
    "tag",
    [
        struct.pack(">HHL4s", 0x0101, 2, 3, b"ab\0\0"),  # a height that is text
        struct.pack(">HHLf", 0x0102, 11, 1, 1.5),
        struct.pack(">HHLl", 0x011A, 9, 1, -5),
    ],
)
def test_read_rgb_invalid_exif_tags_are_ignored(tag, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(60, 90)).save(buffer, "JPEG")
    tags = sorted([struct.pack(">HHLHH", 0x0112, 3, 1, 6, 0), tag])
    block = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + b"".join(tags) + b"\0\0\0\0"
    marker = b"\xff\xe1" + struct.pack(">H", len(block) + 2)
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue()[:2] + marker + block + buffer.getvalue()[2:])
    assert read_rgb(tmp_path / "x.jpg").shape == (90, 60, 3)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"hello, this is text\n", "x.jpg: cannot be read as an image: its content is not"),
        (b"", "x.jpg: cannot be read as an image"),
        (b"\xff\xd8\xff\xe0 broken", "x.jpg: cannot be read as an image"),
    ],
)
def test_read_rgb_not_an_image_raises_one_line(content, message, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as raised:
        read_rgb(path)
    assert "\n" not in str(raised.value)


def test_read_rgb_truncated_missing_or_folder_raises(tmp_path):
    Image.fromarray(picture(200, 300)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="cut.jpg: cannot be read as an image.*truncated"):
        read_rgb(tmp_path / "cut.jpg")
    with pytest.raises(ImageError, match="none.jpg: there is no such file"):
        read_rgb(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="this is a folder"):
        read_rgb(tmp_path)


def test_to_rgb_arrays():
    rgb = picture()
    assert np.array_equal(to_rgb(rgb[:, :, ::-1], "BGR"), rgb)
    assert np.array_equal(to_rgb(rgb / 255.0), rgb)
    assert np.array_equal(to_rgb(rgb.astype(np.uint16) * 257), rgb)
    assert np.array_equal(to_rgb(rgb[:, :, 0]), np.repeat(rgb[:, :, :1], 3, axis=2))
    assert np.array_equal(to_rgb(rgb.astype(np.int64)), rgb)
    assert to_rgb(np.array([[-3.0, 258.5]]))[0, :, 0].tolist() == [0, 255]  # interpolation
    for bad, message in [
        (np.zeros((3, 60, 90), np.uint8), r"shape \(3, 60, 90\)"),
        (np.zeros((0, 9, 3), np.uint8), "shape"),
        (np.full((4, 4, 3), np.nan), "not finite"),
        (np.full((4, 4, 3), 1e6), r"values up to 1e\+06"),
        (np.zeros((4, 4), dtype=object), "type object"),
    ]:
        with pytest.raises(ImageError, match=message):
            to_rgb(bad)
    with pytest.raises(ImageError, match="known: RGB, BGR"):
        to_rgb(rgb, "HSV")


def test_expand_inputs_paths_globs_and_folders(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [str(tmp_path / x) for x in ("a.PNG", "b.jpg")]
    assert expand_inputs([tmp_path]) == names
    assert expand_inputs([str(tmp_path / "*.jpg"), tmp_path]) == [names[1], names[0]]
    assert expand_inputs([str(tmp_path / "gone.jpg")]) == [str(tmp_path / "gone.jpg")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="empty: no image in this folder"):
        expand_inputs([tmp_path / "empty"])
    with pytest.raises(ImageError, match="no file matches"):
        expand_inputs([str(tmp_path / "*.gif")])


def test_read_rgb_any_reader_error_names_the_file(tmp_path, monkeypatch):
    """Pillow's readers raise more than OSError on broken files; no file may stop a whole folder."""
    path = tmp_path / "x.png"
    Image.fromarray(picture()).save(path)

    def fail(*_):
        raise EOFError("no more data")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match=r"x\.png: cannot be read as an image: no more data"):
        read_rgb(path)
