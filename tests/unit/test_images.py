import cv2
import numpy as np
import pytest

from common.data.images import read_planes, resize, statistics, write_planes
from common.data.ingest import space_needed
from common.data.options import Levels
from common.errors import UserError

RNG = np.random.default_rng(0)


def test_area_averaging_is_the_mean_of_blocks():
    image = RNG.integers(0, 256, (64, 64), dtype=np.uint8)
    blocks = image.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    assert np.abs(resize(image, 16) - blocks).max() <= 0.5


def test_16_bit_is_averaged_in_16_bit_and_mapped_linearly():
    assert resize(np.full((4, 4), 65535, np.uint16), 2).tolist() == [[255, 255], [255, 255]]
    assert resize(np.full((4, 4), 257 * 100, np.uint16), 4).max() == 100
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(resize(ramp, 256), np.rint(ramp / 257))


@pytest.mark.parametrize("levels", [Levels(0, 4095), Levels(32768, 36863), Levels(100, 101), Levels(65534, 65535)])
def test_16_bit_between_black_and_white_is_mapped_linearly_and_the_rest_is_cut_off(levels):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(
        np.clip(255 * (ramp.astype(float) - levels.black) / (levels.white - levels.black), 0, 255) + 0.5
    )
    np.testing.assert_array_equal(resize(ramp, 256, levels), expected)
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(resize(eight, 16, levels), eight)


def test_what_is_enlarged_is_interpolated_and_keeps_its_mean():
    plane = np.array([[0, 200], [100, 40]], np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    large = resize(plane, 16)
    assert (
        large.shape == (16, 16)
        and large.max() <= 200
        and abs(large.mean() - plane.mean()) < 1
        and len(np.unique(large)) > 4
    )


def test_stored_planes_come_back_and_the_statistics_are_theirs(tmp_path):
    planes = RNG.integers(0, 256, (4, 32, 32), dtype=np.uint8)
    write_planes(tmp_path / "a.tif", planes)
    np.testing.assert_array_equal(read_planes(tmp_path / "a.tif"), planes)
    values = statistics(planes)
    np.testing.assert_allclose(values["mean_blue"], planes[2].mean() / 255)
    np.testing.assert_allclose(values["std_yellow"], planes[3].std() / 255)
    assert values["crc"] != statistics(planes[::-1])["crc"]


def test_black_and_saturated_pixels_are_counted_by_channel():
    planes = np.full((4, 10, 10), 128, np.uint8)
    planes[0, 0, :3], planes[1, :2], planes[2] = 0, 255, 0
    planes[3, 0, :2], planes[3, 1, :2] = (254, 255), (0, 1)
    values = statistics(planes)
    for name, shares in (("zeros", [0.03, 0, 1, 0.01]), ("saturated", [0, 0.2, 0, 0.01])):
        found = [values[f"{name}_{channel}"] for channel in ("red", "green", "blue", "yellow")]
        np.testing.assert_allclose(found, shares, atol=1e-12)


@pytest.mark.parametrize("size", [96, 512])  # uncompressed, compressed
def test_stored_planes_come_back_and_damaged_ones_are_refused(tmp_path, size):
    planes = np.random.default_rng(0).integers(0, 256, (4, size, size), dtype=np.uint8)
    path = tmp_path / "a.tif"
    write_planes(path, planes)
    np.testing.assert_array_equal(read_planes(path), planes)
    path.write_bytes(path.read_bytes()[: size * size * 2])
    with pytest.raises(UserError, match=r"a.tif cannot be read \(.*\); delete it, and run: python 01_preprocess.py"):
        read_planes(path)
    path.write_bytes(b"no image" * size)
    with pytest.raises(UserError, match=r"a.tif cannot be read \(.*\); delete it, and run: python 01_preprocess.py"):
        read_planes(path)


@pytest.mark.parametrize("side", [128, 256, 768])
def test_the_space_that_is_asked_for_is_what_an_image_takes(tmp_path, side):
    rng = np.random.default_rng(0)
    cells = cv2.GaussianBlur(rng.random((side, side), dtype=np.float32), (0, 0), 4)
    planes = np.stack([cv2.normalize(cells, None, 0, 200, cv2.NORM_MINMAX) + 4 * rng.random((side, side))] * 4).astype(
        np.uint8
    )
    write_planes(tmp_path / "a.tif", planes)
    size = (tmp_path / "a.tif").stat().st_size
    assert size == pytest.approx(space_needed([side]), rel=0.02 if side <= 256 else 0.6)
