"""The store: images of any version are read bit for bit, whole or in part; changed ones are refused."""

import zlib

import numpy as np
import pytest
import tifffile

from common.data import images, tiff
from common.data.images import checksum, corner, read_planes, write_planes
from common.errors import UserError

SIDE = 300  # above PLAIN_SIDE
WINDOWS = [(100, 0, 0), (100, 0.999, 0.5), (20, 0.33, 0.999), (96, 0.4706, 0), (299, 0.6, 0.4), (300, 0.9, 0.9)]
REFUSED = (
    r"a.tif cannot be read \(its pixels are not those that were stored\); delete it, and run: python 01_preprocess.py"
)


def noise(side=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (4, side, side), dtype=np.uint8)


def smooth(side=SIDE):
    down, right = np.mgrid[:side, :side]
    return np.stack([(down * k + right) // 3 for k in range(1, 5)]).astype(np.uint8)


def tags(path):
    with tifffile.TiffFile(path) as file:
        return [{tag.name: tag.value for tag in page.tags} for page in file.pages]


def swap_bytes(path, old: int, new: bytes):
    content = bytearray(path.read_bytes())
    content[old : old + len(new)] = new
    path.write_bytes(content)


# The calls of earlier versions, word for word.
EARLIER = {
    "deflate with predictor": {
        "metadata": {"axes": "CYX", "channels": images.CHANNELS},
        "compression": "zlib",
        "predictor": True,
    },
    "without names": {"compression": "zlib", "predictor": True},
    "deflate in strips, with their checksums in a tag": {
        "compression": "zlib",
        "rowsperstrip": 96,
        "extratags": [(65001, "I", 2, (1, 2), True)],
    },
    "uncompressed": {"metadata": {"axes": "CYX", "channels": images.CHANNELS}},
    "on a big-endian machine": {"compression": "zlib", "predictor": True, "byteorder": ">"},
}


@pytest.mark.parametrize("how", EARLIER.values(), ids=EARLIER)
@pytest.mark.parametrize("side", [8, SIDE])
def test_what_earlier_versions_stored_is_read(tmp_path, how, side):
    planes = noise(side)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack", **how)
    crc = f"{zlib.crc32(planes):08x}"
    np.testing.assert_array_equal(read_planes(tmp_path / "a.tif", crc), planes)
    top, left = corner(0.4, 5, side), corner(0.9, 5, side)
    np.testing.assert_array_equal(
        read_planes(tmp_path / "a.tif", crc, (5, 0.4, 0.9)), planes[:, top : top + 5, left : left + 5]
    )
    with pytest.raises(UserError, match=REFUSED):
        read_planes(tmp_path / "a.tif", "00000000", (5, 0.4, 0.9))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("planes", [noise(), smooth()], ids=["noise", "smooth"])
def test_stored_planes_and_their_windows_come_back(tmp_path, planes, raw):
    path, crc = tmp_path / "a.tif", f"{zlib.crc32(planes):08x}"
    write_planes(path, planes, raw)
    np.testing.assert_array_equal(tifffile.imread(path), planes)
    for lent in (False, True):
        np.testing.assert_array_equal(read_planes(path, crc, lent=lent), planes)
        for size, down, right in WINDOWS:
            top, left = int(down * (SIDE - size + 1)), int(right * (SIDE - size + 1))
            found = read_planes(path, crc, (size, down, right), lent)
            np.testing.assert_array_equal(found, planes[:, top : top + size, left : left + size])
    assert (path.stat().st_size > planes.size) == raw


def test_large_images_are_pages_of_one_strip_and_only_smooth_ones_have_a_predictor(tmp_path):
    for name, planes, predictor in (("noise", noise(), 1), ("smooth", smooth(), 2)):
        write_planes(tmp_path / name, planes)
        pages = tags(tmp_path / name)
        assert len(pages) == 4 and all(len(page["StripOffsets"]) == 1 for page in pages)
        assert {(page["Compression"], page["SamplesPerPixel"], page.get("Predictor", 1)) for page in pages} == {
            (50000, 1, predictor)
        }
        with tifffile.TiffFile(tmp_path / name) as file:
            assert [(series.axes, series.shape) for series in file.series] == [("CYX", (4, SIDE, SIDE))]


def test_another_image_is_refused_whatever_part_of_it_is_read(tmp_path):
    planes, other = noise(), noise()
    other[3, 299, 299] ^= 1
    write_planes(tmp_path / "a.tif", other)
    for window in ((10, 0, 0), None):
        with pytest.raises(UserError, match=REFUSED):
            read_planes(tmp_path / "a.tif", checksum(planes), window)


@pytest.mark.parametrize("tag", [256, 257, 259, 273, 278, 279])
@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_a_header_that_lies_is_refused(tmp_path, tag, value):
    path, planes = tmp_path / "a.tif", noise()
    write_planes(path, planes)
    content = path.read_bytes()
    at = content.index(tag.to_bytes(2, "little"), int.from_bytes(content[4:8], "little"))
    counted = tag in (273, 279)  # whose count is changed, not the value
    swap_bytes(path, at + (4 if counted else 8), value.to_bytes(4, "little"))
    for window in ((96, 0.5, 0.5), None):
        with pytest.raises(UserError, match="a.tif cannot be read"):
            read_planes(path, checksum(planes), window)


@pytest.mark.parametrize(("side", "rows"), [(8, 1), (8, 3), (8, 8), (9, 8)])
@pytest.mark.parametrize("compression", [1, 8])
def test_strips_of_any_height_are_read_up_to_the_largest_side(tmp_path, side, rows, compression):
    planes = noise(side)
    how = {"compression": "zlib"} if compression == 8 else {}
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack", rowsperstrip=rows, **how)
    np.testing.assert_array_equal(read_planes(tmp_path / "a.tif"), planes)
    data = tiff.read_bytes(tmp_path / "a.tif")
    layout = tiff.read_layout(data, 4, side)
    assert (layout.side, layout.compression, layout.predictor) == (side, compression, 1)
    assert sum(layout.lengths()) == side and all(len(strips) == len(layout.lengths()) for strips in layout.strips)
    assert max(layout.lengths()) == rows or compression == 1  # tifffile joins the strips of small plain pages
    with pytest.raises(ValueError, match=f"claims {side} x {side} px in strips of "):
        tiff.read_layout(data, 4, side - 1)


def test_lent_memory_is_used_again_and_other_memory_is_not(tmp_path):
    for seed in (1, 2):
        write_planes(tmp_path / f"{seed}.tif", noise(seed=seed))
    kept, lent = read_planes(tmp_path / "1.tif"), read_planes(tmp_path / "1.tif", lent=True)
    assert np.shares_memory(lent, read_planes(tmp_path / "2.tif", lent=True))
    np.testing.assert_array_equal(kept, noise(seed=1))
    np.testing.assert_array_equal(lent, noise(seed=2))
