import os

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from common import images
from common.errors import UserError
from common.images import (BadImage, channel_files, list_files, read_channel, read_header, read_planes, read_sample,
                           resize, statistics, write_planes)
from common.preprocess import space_needed

RNG = np.random.default_rng(0)


def grey(path, size=64, dtype=np.uint8):
    image = RNG.integers(0, np.iinfo(dtype).max, (size, size), endpoint=True, dtype=dtype)
    tifffile.imwrite(path, image) if path.suffix == ".tif" else Image.fromarray(image).save(path)
    return image


@pytest.mark.parametrize(("name", "dtype"), [("a.tif", np.uint8), ("a.tif", np.uint16), ("a.png", np.uint8), ("a.png", np.uint16)])
def test_grey_images_come_back_as_they_are(tmp_path, name, dtype):
    image = grey(tmp_path / name, dtype=dtype)
    read = read_channel(tmp_path / name, "green")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_truncated_image_is_refused(tmp_path, name, share):
    path = tmp_path / name
    grey(path)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(BadImage, match="cannot be"):
        read_channel(path, "green")


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: tifffile.imwrite(p, np.zeros((8, 8, 3), np.uint8), photometric="rgb"), "is a colour image"),
    (lambda p: tifffile.imwrite(p, np.zeros((8, 9), np.uint8)), r"is not square \(9 x 8 px\)"),
    (lambda p: tifffile.imwrite(p, np.zeros((8, 8), np.float32)), "holds float32"),
    (lambda p: tifffile.imwrite(p, np.zeros((3, 8, 8), np.uint8), photometric="minisblack"), "has 3 pages"),
    (lambda p: tifffile.imwrite(p, np.zeros((8, 8), np.uint8), photometric="miniswhite"), "inverted"),
    (lambda p: p.write_bytes(b""), "cannot be read"),
    (lambda p: p.write_bytes(b"not a picture"), "cannot be read"),
])
def test_an_unusable_tiff_is_refused(tmp_path, make, message):
    make(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=message):
        read_channel(tmp_path / "a.tif", "green")


def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (20000, 20000)).save(path)
    with pytest.raises(BadImage):
        read_header(path)


def test_a_file_that_decodes_to_another_size_than_its_header_says_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "decode", lambda path: np.zeros((32, 64), np.uint8))
    with pytest.raises(BadImage, match=r"^decodes to \(32, 64\), its header says 64 x 64"):
        read_channel(tmp_path / "a.png", "green")


def test_channels_of_rgb_coded_images_are_their_planes(tmp_path):
    planes = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 100), "yellow": (90, 90, 0)}
    for channel, colour in planes.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{channel}.jpg", quality=95)
        read = read_channel(tmp_path / f"{channel}.jpg", channel, rgb_coded=True)
        assert read.shape == (32, 32) and read.dtype == np.uint8
        np.testing.assert_allclose(read, max(colour), atol=2)


def test_area_averaging_is_the_mean_of_blocks():
    image = RNG.integers(0, 256, (64, 64), dtype=np.uint8)
    blocks = image.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    assert np.abs(resize(image, 16) - blocks).max() <= 0.5


def test_16_bit_is_averaged_in_16_bit_and_mapped_linearly():
    assert resize(np.full((4, 4), 65535, np.uint16), 2).tolist() == [[255, 255], [255, 255]]
    assert resize(np.full((4, 4), 257 * 100, np.uint16), 4).max() == 100
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(resize(ramp, 256), np.rint(ramp / 257))


def test_what_is_enlarged_is_interpolated_and_keeps_its_mean():
    plane = np.array([[0, 200], [100, 40]], np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    large = resize(plane, 16)
    assert large.shape == (16, 16) and large.max() <= 200 and abs(large.mean() - plane.mean()) < 1 and len(np.unique(large)) > 4


def test_stored_planes_come_back_and_the_statistics_are_theirs(tmp_path):
    planes = RNG.integers(0, 256, (4, 32, 32), dtype=np.uint8)
    write_planes(tmp_path / "a.tif", planes)
    np.testing.assert_array_equal(read_planes(tmp_path / "a.tif"), planes)
    values = statistics(planes)
    np.testing.assert_allclose(values["mean_blue"], planes[2].mean() / 255)
    np.testing.assert_allclose(values["std_yellow"], planes[3].std() / 255)
    assert values["crc"] != statistics(planes[::-1])["crc"]


def test_tiff_is_preferred_over_png_and_whole_samples_over_parts(tmp_path):
    full, small = tmp_path / "full", tmp_path / "small"
    for folder in (full, small):
        folder.mkdir()
    for colour in ("red", "green", "blue", "yellow"):
        grey(small / f"a_{colour}.png")
        grey(small / f"b_{colour}.png")
        grey(small / f"b_{colour}.tif")
        if colour != "red":
            grey(full / f"a_{colour}.tif")
    folders = [list_files(full), list_files(small)]
    assert [path.name for path in channel_files("a", folders)[0]] == [f"a_{c}.png" for c in ("red", "green", "blue", "yellow")]
    assert all(path.suffix == ".tif" for path in channel_files("b", folders)[0])
    assert channel_files("c", folders) == ([], ["c_red", "c_green", "c_blue", "c_yellow"])
    assert channel_files("a", [folders[0]]) == ([], ["a_red"])


def test_folders_and_pipes_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a_red.tif")
    (tmp_path / "a_green.tif").mkdir()
    grey(tmp_path / "a_blue.tif")
    (tmp_path / "a_yellow.tif").symlink_to("a_blue.tif")
    assert set(list_files(tmp_path)) == {"a_blue", "a_yellow"}


def test_channels_of_different_sizes_are_refused(tmp_path):
    files = [tmp_path / f"a_{colour}.tif" for colour in ("red", "green", "blue", "yellow")]
    for path, size in zip(files, (8, 8, 16, 8), strict=True):
        grey(path, size)
    with pytest.raises(BadImage, match=r"channels of different sizes \[8, 16\] px"):
        read_sample(files)


@pytest.mark.parametrize("size", [96, 512])  # uncompressed, compressed
def test_stored_planes_come_back_and_damaged_ones_are_refused(tmp_path, size):
    planes = np.random.default_rng(0).integers(0, 256, (4, size, size), dtype=np.uint8)
    path = tmp_path / "a.tif"
    write_planes(path, planes)
    np.testing.assert_array_equal(read_planes(path), planes)
    path.write_bytes(path.read_bytes()[:size * size * 2])
    with pytest.raises(UserError, match=r"a.tif cannot be read \(.*\); delete it, and run: python 01_preprocess.py"):
        read_planes(path)
    path.write_bytes(b"no image" * size)
    with pytest.raises(UserError, match=r"a.tif cannot be read \(.*\); delete it, and run: python 01_preprocess.py"):
        read_planes(path)


@pytest.mark.parametrize("side", [128, 256, 768])
def test_the_space_that_is_asked_for_is_what_an_image_takes(tmp_path, side):
    rng = np.random.default_rng(0)
    cells = cv2.GaussianBlur(rng.random((side, side), dtype=np.float32), (0, 0), 4)
    planes = np.stack([cv2.normalize(cells, None, 0, 200, cv2.NORM_MINMAX) + 4 * rng.random((side, side))] * 4).astype(np.uint8)
    write_planes(tmp_path / "a.tif", planes)
    size = (tmp_path / "a.tif").stat().st_size
    assert size == pytest.approx(space_needed([side]), rel=0.02 if side <= 256 else 0.6)
