import os
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image

from common.data import sources
from common.data.sources import (
    BadImage,
    channel_files,
    examine_sample,
    list_files,
    looks_cut_short,
    not_found,
    read_channel,
    read_sample,
    read_side,
    through_table,
)
from tests.tiffs import TURNS, agreed, stretched, turned, write_tiff

RNG = np.random.default_rng(0)
RAMP = np.arange(256) * 257
GREEN = np.stack([0 * RAMP, RAMP, 0 * RAMP], axis=1)


def grey(path, size=64, dtype=np.uint8):
    image = RNG.integers(0, np.iinfo(dtype).max, (size, size), endpoint=True, dtype=dtype)
    tifffile.imwrite(path, image) if path.suffix == ".tif" else Image.fromarray(image).save(path)
    return image


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.tif", np.uint8), ("a.tif", np.uint16), ("a.png", np.uint8), ("a.png", np.uint16)]
)
def test_grey_images_come_back_as_they_are(tmp_path, name, dtype):
    image = grey(tmp_path / name, dtype=dtype)
    read = read_channel(tmp_path / name, "green")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", ["lzw", "deflate", "adobe_deflate", "zstd"])
def test_tiffs_with_a_predictor_come_back_as_they_are(tmp_path, compression, dtype):
    image = RNG.integers(0, np.iinfo(dtype).max, (16, 16), endpoint=True, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, compression=compression, predictor=True)
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), image)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_truncated_image_is_refused(tmp_path, name, share):
    path = tmp_path / name
    grey(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadImage, match="cannot be"):
        read_channel(path, "green")


@pytest.mark.parametrize("name", ["a.tif", "a.PNG", "a.jpg"])
def test_the_end_of_a_file_tells_whether_it_is_cut_short(tmp_path, name):
    path = tmp_path / name
    if name == "a.tif":  # whose last bytes are pixels
        tifffile.imwrite(path, RNG.integers(0, 256, (64, 64), dtype=np.uint8), rowsperstrip=16)
    else:
        grey(path, 200)
    content = path.read_bytes()
    assert not looks_cut_short(path)
    for kept in (content[:-9], content[: len(content) // 2], content[:8], b""):
        path.write_bytes(kept)
        assert looks_cut_short(path)
    path.write_bytes(content + b"\0" * 9)
    assert not looks_cut_short(path)


def test_a_tiff_is_cut_short_from_its_first_missing_byte_on(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 256, (64, 64), dtype=np.uint8), rowsperstrip=16)
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        end = tiff.pages.first.dataoffsets[-1] + tiff.pages.first.databytecounts[-1]
    for kept in (end, end - 1):
        (tmp_path / "a.tif").write_bytes(content[:kept])
        assert looks_cut_short(tmp_path / "a.tif") == (kept < end)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: tifffile.imwrite(p, np.zeros((8, 8, 3), np.uint8), photometric="rgb"), "is a colour image"),
        (lambda p: tifffile.imwrite(p, np.zeros((8, 9), np.uint8)), r"is not square \(9 x 8 px\)"),
        (lambda p: tifffile.imwrite(p, np.zeros((8, 8), np.float32)), "holds float32"),
        (lambda p: tifffile.imwrite(p, np.zeros((3, 8, 8), np.uint8), photometric="minisblack"), "has 3 pages"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_bytes(b"not a picture"), "cannot be read"),
    ],
)
def test_an_unusable_tiff_is_refused(tmp_path, make, message):
    make(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=message):
        read_channel(tmp_path / "a.tif", "green")


def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (8200, 8200)).save(path, compress_level=1)
    with pytest.raises(BadImage):
        read_side(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("size", "refused"),
    [((16, 16), None), ((17, 17), "claims"), ((17, 8), "claims"), ((8, 17), "claims"), ((16, 15), "is not")],
)
def test_the_largest_side_is_accepted_and_one_pixel_more_in_either_direction_is_not(
    tmp_path, monkeypatch, suffix, size, refused
):
    monkeypatch.setattr(sources, "MAX_SIDE", 16)
    path = tmp_path / f"a{suffix}"
    Image.new("L", size).save(path)
    if refused is None:
        assert read_side(path) == 16
    else:
        with pytest.raises(BadImage, match=f"^{refused} "):
            read_side(path)


def test_a_file_that_decodes_to_another_size_than_its_header_says_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    reader = replace(sources.READERS["PNG"], pixels=lambda image: np.zeros((32, 64), np.uint8))
    monkeypatch.setitem(sources.READERS, "PNG", reader)
    with pytest.raises(BadImage, match=r"^decodes to \(32, 64\), its header says 64 x 64"):
        read_channel(tmp_path / "a.png", "green")


def test_channels_of_rgb_coded_images_are_their_planes(tmp_path):
    planes = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 100), "yellow": (90, 90, 0)}
    for channel, colour in planes.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{channel}.jpg", quality=95)
        read = read_channel(tmp_path / f"{channel}.jpg", channel, rgb_coded=True)
        assert read.shape == (32, 32) and read.dtype == np.uint8
        np.testing.assert_allclose(read, max(colour), atol=2)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [((90, 91, 0), 91), ((91, 90, 7), 91), ((90, 90, 9), 90), ((255, 254, 0), 255), ((0, 1, 255), 1), ((0, 0, 255), 0)],
)
def test_the_mean_of_two_planes_is_rounded_half_up(tmp_path, colour, expected):
    Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
    assert set(read_channel(tmp_path / "a.png", "yellow", rgb_coded=True).ravel()) == {expected}


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
    assert [path.name for path in channel_files("a", folders)[0]] == [
        f"a_{c}.png" for c in ("red", "green", "blue", "yellow")
    ]
    assert all(path.suffix == ".tif" for path in channel_files("b", folders)[0])
    assert channel_files("c", folders) == ([], ["c_red", "c_green", "c_blue", "c_yellow"])
    assert channel_files("a", [folders[0]]) == ([], ["a_red"])
    for name in ("a_blue.png", "a_green.png"):
        (small / name).unlink()
    for order in ((full, small), (small, full)):  # of incomplete folders, the fullest one names the missing files
        assert channel_files("a", [list_files(folder) for folder in order]) == ([], ["a_red"])


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


# --- TIFF: tags that change what the pixels mean ------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_values_of_any_depth_become_the_whole_range(tmp_path, bits, photometric, fill_order, order):
    values = RNG.integers(0, 2**bits, (16, 16))
    values[0, :2] = 0, 2**bits - 1
    write_tiff(
        tmp_path / "a.tif",
        values,
        bits,
        photometric,
        fill_order,
        order=order,
        rows=5,
        compression=8 if bits == 8 else 1,
    )
    image = read_channel(tmp_path / "a.tif", "green")
    assert image.dtype == (np.uint8 if bits <= 8 else np.uint16) and (image.min(), image.max()) == (
        0,
        np.iinfo(image.dtype).max,
    )
    expected = stretched(values, bits)
    np.testing.assert_array_equal(image, expected if photometric else np.iinfo(image.dtype).max - expected)
    other = agreed(tmp_path / "a.tif")
    assert other is None or (other == image).all()


@pytest.mark.parametrize("orientation", [0, 1, *TURNS, 9])
def test_orientation_is_respected_in_tiff_png_and_jpeg(tmp_path, orientation):
    values = RNG.integers(0, 256, (8, 8)).repeat(8, axis=0).repeat(8, axis=1)
    write_tiff(tmp_path / "a.tif", values, orientation=orientation)
    expected = turned(values, orientation)
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), expected)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_channel(tmp_path / "a.png", "green"), expected)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif, quality=100)
    np.testing.assert_allclose(read_channel(tmp_path / "a.jpg", "green"), expected, atol=4)


def test_planes_stored_one_after_the_other_are_those_stored_pixel_by_pixel(tmp_path):
    values = RNG.integers(0, 256, (16, 16, 3))
    for planar in (1, 2):
        write_tiff(tmp_path / "a.tif", values, photometric=2, planar=planar, rows=6, orientation=6)
        for k, channel in enumerate(("red", "green", "blue")):
            np.testing.assert_array_equal(
                read_channel(tmp_path / "a.tif", channel, rgb_coded=True), np.rot90(values[..., k], -1)
            )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, {}) for shape in [(1, 16, 16), (16, 16, 1), (1, 1, 16, 16), (1, 16, 16, 1)]),
        ((1, 16, 16), {"imagej": True}),
        ((1, 16, 16), {"ome": True}),
        ((16, 16, 1), {"tile": (16, 16)}),
    ],
)
def test_axes_of_size_one_are_no_further_images(tmp_path, shape, kind):
    values = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values.reshape(shape), photometric="minisblack", **kind)
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), values)


def test_smaller_copies_old_descriptions_and_other_files_of_the_series_are_no_further_images(tmp_path):
    values = RNG.integers(0, 256, (16, 16))
    for tags in (
        {"subfiles": (0, 1, 1)},
        {"subfiles": (0,) + (1,) * 15},
        {"description": "ImageJ=1.53t\nimages=4\n", "compression": 8},
        {"description": '{"shape": "x"}'},
    ):
        write_tiff(tmp_path / "a.tif", values, **tags)
        np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), values)
    ome = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" Type="uint8" '
        'DimensionOrder="XYCZT" SizeX="16" SizeY="16" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData FirstC="0" PlaneCount="1"><UUID FileName="a.tif">urn:uuid:1</UUID></TiffData>'
        '<TiffData FirstC="1" PlaneCount="1"><UUID FileName="b.tif">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
    )
    write_tiff(tmp_path / "a.tif", values, description=ome)
    write_tiff(tmp_path / "b.tif", 255 - values, description=ome)
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), values)


VALUES = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"subfiles": (0, 0)}, "has 2 pages"),
        ({"subfiles": (1, 0)}, "has 2 pages"),
        ({"subfiles": (0, 1, 0)}, "has 3 pages"),  # one image among smaller copies
        ({"subfiles": (0, 0, 1)}, "has 3 pages"),
        ({"subfiles": (0,) + (1,) * 16}, "has 17 pages"),
        ({"more": [(322, "I", [8208]), (323, "I", [16])]}, r"claims .* px; at most 8192 x 8192"),
        ({"more": [(322, "I", [16]), (323, "I", [8208])]}, r"claims .* px; at most 8192 x 8192"),
        ({"more": [(32997, "I", [2])]}, "claims 2 x 16 x 16 px"),
        ({"description": '{"shape": [3, 16, 16], "truncated": true}', "images": 3}, "has 3 images in one page"),
        ({"description": "ImageJ=1.53t\nimages=4\nslices=4\n", "images": 4}, "has 4 images in one page"),
        ({"photometric": 6}, "is stored as YCBCR with 1 values per pixel"),
        ({"photometric": 2}, "is stored as RGB with 1 values per pixel"),
        ({"photometric": 4}, "is stored as MASK"),
        ({"more": [(262, "H", None)]}, "does not say whether 0 is black"),
        ({"more": [(339, "H", [2])]}, "holds int8"),
        ({"more": [(317, "H", [2])]}, "has the predictor HORIZONTAL for 8 bits compressed as NONE"),
        ({"more": [(279, "I", [0])]}, "is cut short: strip 0 of 0 to 0 has no data"),
        ({"rows": 4, "more": [(273, "I", [8, 72, 0, 200])]}, "is cut short: strip 2 of 0 to 3 has no data"),
        ({"rows": 4, "more": [(273, "I", [8, 72])]}, "is cut short: strip 2 of 0 to 3 has no data"),
        ({"fill_order": 3}, "has the FillOrder 3"),
        ({"table": RNG.integers(0, 65536, (256, 3)), "photometric": 3}, "is a colour image"),
    ],
)
def test_a_tiff_that_would_be_read_wrongly_is_refused_by_name(tmp_path, tags, message):
    write_tiff(tmp_path / "a.tif", VALUES, **tags)
    with pytest.raises(BadImage, match=message):
        read_channel(tmp_path / "a.tif", "green")
    with pytest.raises(BadImage, match=message):
        read_side(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("n", "extra", "message"),
    [
        (2, [2], "has an alpha channel; save it without"),
        (4, [1], "has an alpha channel"),
        (5, [0, 1], "has an alpha channel"),
        (5, [2, 0], "has an alpha channel"),
        (2, [0], "has 2 values per pixel; expected one"),
        (5, [0, 0], "has 5 values per pixel; expected one"),
    ],
)
def test_more_values_a_pixel_are_refused_by_name(tmp_path, n, extra, message):
    write_tiff(tmp_path / "a.tif", np.zeros((8, 8, n), int), photometric=1 if n == 2 else 2, more=[(338, "H", extra)])
    with pytest.raises(BadImage, match=message):
        read_channel(tmp_path / "a.tif", "green", rgb_coded=True)


def test_the_first_page_says_for_how_many_images_it_stands_not_its_smaller_copies(tmp_path):
    stack = RNG.integers(0, 256, (3, 16, 16), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(stack, photometric="minisblack", truncate=True)
        tiff.write(stack[0, ::2, ::2], photometric="minisblack", subfiletype=1)
    with pytest.raises(BadImage, match="^has 3 images in one page; expected one channel per file$"):
        read_channel(tmp_path / "a.tif", "green")


def test_a_tile_without_data_is_refused_as_cut_short(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RNG.integers(0, 256, (64, 64), dtype=np.uint8), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        offsets = tiff.pages.first.tags["TileOffsets"]
        offsets.overwrite([0 if k == 1 else value for k, value in enumerate(offsets.value)])
    with pytest.raises(BadImage, match="is cut short: tile 1 of 0 to 3 has no data"):
        read_channel(path, "green")


# --- colour tables -----------------------------------------------------------------------------------------


def test_a_display_table_leaves_values_as_they_are_and_a_grey_one_gives_the_levels(tmp_path):
    values = RNG.integers(0, 256, (16, 16))
    cut = np.clip((RAMP - 20000) * 3, 0, 65535)  # contrast that ImageJ has set for display only
    hot = np.stack([np.clip(RAMP * 2 - 65535, 0, 65535), np.clip(RAMP * 2, 0, 65535), RAMP // 2], axis=1)
    for table, expected in [
        (GREEN, values),
        (np.stack([cut, cut, 0 * cut], axis=1), values),
        (hot, values),
        (np.stack([RAMP] * 3, axis=1), values),
        (np.stack([RAMP[::-1]] * 3, axis=1), 255 - values),
    ]:
        write_tiff(tmp_path / "a.tif", values, photometric=3, table=table)
        np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), expected)
    levels = np.zeros((256, 3), int)
    levels[:4] = np.array([0, 30, 100, 255])[:, None] * 257  # only the levels in the picture, as optimizers write them
    write_tiff(tmp_path / "a.tif", values % 4, photometric=3, table=levels)
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif", "green"), np.array([0, 30, 100, 255])[values % 4])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("entry", "kind"), [((100, 100, 100), "grey"), ((100, 100, 101), "colour")])
def test_one_entry_makes_a_table_one_of_colours(tmp_path, suffix, entry, kind):
    values = np.arange(256).reshape(16, 16)
    falling = np.stack([np.arange(256)[::-1]] * 3, axis=1)
    falling[155] = entry
    rising = GREEN // 257
    rising[155] = [0, 155, 0] if kind == "grey" else [0, 153, 0]  # below the entry before
    for table, levels in ((falling, 255 - values), (rising, values)):
        palette_picture(values, table).save(tmp_path / f"a{suffix}")
        if kind == "grey":
            np.testing.assert_array_equal(read_channel(tmp_path / f"a{suffix}", "green"), levels)
        else:
            with pytest.raises(BadImage, match="is a colour image"):
                read_channel(tmp_path / f"a{suffix}", "green")


def palette_picture(values, table):
    picture = Image.fromarray(values.astype(np.uint8))
    picture.putpalette(np.asarray(table, np.uint8).tobytes())
    return picture


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_table_of_colours_is_looked_up_where_colours_code_the_channel(tmp_path, suffix):
    values = RNG.integers(0, 4, (16, 16))
    table = np.zeros((256, 3), np.uint8)
    table[:4] = [(0, 200, 0), (0, 0, 0), (9, 80, 3), (0, 255, 0)]
    palette_picture(values, table).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_channel(tmp_path / f"a{suffix}", "green", rgb_coded=True), table[values, 1])
    with pytest.raises(BadImage, match="is a colour image"):
        read_channel(tmp_path / f"a{suffix}", "green")


def test_values_beyond_a_table_are_black():
    indices = np.array([[0, 3], [2, 9]], np.uint8)
    table = np.array([(10, 1, 2), (20, 3, 4), (30, 5, 6)], np.uint8)
    assert through_table(indices, table, "grey").tolist() == [[10, 0], [30, 0]]
    assert through_table(indices, table, "colour").tolist() == [[[10, 1, 2], [0, 0, 0]], [[30, 5, 6], [0, 0, 0]]]


# --- PNG and JPEG ------------------------------------------------------------------------------------------


def test_grey_pngs_of_any_kind_are_read_as_they_are(tmp_path):
    values = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(values > 99).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_channel(tmp_path / "1.png", "green"), np.where(values > 99, 255, 0))
    levels = np.array([200, 0, 30, 100])
    palette_picture(values % 4, np.stack([levels] * 3, axis=1)).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_channel(tmp_path / "p.png", "green"), levels[values % 4])
    palette_picture(values, GREEN // 257).save(tmp_path / "lut.png")
    np.testing.assert_array_equal(read_channel(tmp_path / "lut.png", "green"), values)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_alpha_channel_is_named(tmp_path, mode):
    Image.new(mode, (16, 16)).save(tmp_path / "a.png")
    for rgb_coded in (False, True):
        with pytest.raises(BadImage, match="^has an alpha channel; save it without$"):
            read_channel(tmp_path / "a.png", "green", rgb_coded)


def test_a_png_of_several_frames_is_refused(tmp_path):
    frames = [Image.new("L", (16, 16), value) for value in (1, 2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="has 2 frames"):
        read_channel(tmp_path / "a.png", "green")


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0e\x01", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense"]
)
def test_damaged_exif_data_harm_no_pixels(tmp_path, exif):
    image = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(image).save(tmp_path / "b.jpg")
    np.testing.assert_array_equal(read_channel(tmp_path / "a.jpg", "green"), read_channel(tmp_path / "b.jpg", "green"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize(
    "text", ["../annex/objects/SHA256-s12--ab", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"]
)
def test_a_pointer_to_a_file_that_is_not_there_is_called_so(tmp_path, suffix, text):
    (tmp_path / f"a{suffix}").write_text(text)
    with pytest.raises(BadImage) as error:
        read_channel(tmp_path / f"a{suffix}", "green")
    assert str(error.value) == (
        f"cannot be read: a link to a missing file? It holds only the text '{' '.join(text.split())}'"
    )


# --- names -------------------------------------------------------------------------------------------------


def test_names_are_compared_in_one_spelling_and_dot_files_are_none(tmp_path):
    name = "M\u00fcller"
    for file in (
        f"{unicodedata.normalize('NFD', name)}_red.TIF",
        f"{name}_green.ome.tif",
        f"{name}_blue.Ome.TIFF",
        f"{name}_yellow.PNG",
        f"._{name}_red.tif",
        ".x_red.png",
    ):
        (tmp_path / file).touch()
    files = list_files(tmp_path)
    assert set(files) == {f"{name}_{channel}" for channel in sources.CHANNELS}
    for spelling in ("NFC", "NFD"):
        found, lacking = channel_files(unicodedata.normalize(spelling, name), [files])
        assert len(found) == 4 and not lacking and all(path.is_file() for path in found)


def test_of_two_files_for_one_channel_the_same_is_always_taken(tmp_path):
    for file in ("a_red.TIF", "a_red.tif", "a_red.ome.tif", "a_red.PNG"):
        (tmp_path / file).touch()
    assert list_files(tmp_path)["a_red"].name == "a_red.TIF"


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda f: (f / "a_red.tif.gz").touch(), "; found a_red.tif.gz (unpack it)"),
        (lambda f: (f / "a_red.bmp").touch(), "; found a_red.bmp (save it as TIFF, PNG or JPEG)"),
        (
            lambda f: (f / "a_red.png").symlink_to("gone.png"),
            "; found a_red.png (a link to gone.png, which is missing)",
        ),
        (lambda f: (f / "a_red.tif").mkdir(), "; found a_red.tif (a folder)"),
        (lambda f: os.mkfifo(f / "a_red.tif"), "; found a_red.tif (not a regular file)"),
        (lambda f: (f / "A_Red.tif").touch(), "; found A_Red.tif (rename it to a_red.tif)"),
        (lambda f: (f / "._a_red.tif").touch(), ""),
        (lambda f: (f / "ab_red.tif.gz").touch(), ""),
    ],
)
def test_a_file_of_nearly_the_same_name_is_named_with_the_cure(tmp_path, make, hint):
    make(tmp_path)
    files = list_files(tmp_path)
    lacking = channel_files("a", [files])[1]
    assert lacking[0] == "a_red"
    assert (
        not_found(["a_red"], [list_files(tmp_path / "none"), files]) == f"a_red not found as .tif, .png or .jpg{hint}"
    )


def test_a_channel_in_another_folder_is_named(tmp_path):
    for folder, channels in (("full", ("green", "blue", "yellow")), ("small", ("red",))):
        (tmp_path / folder).mkdir()
        for channel in channels:
            (tmp_path / folder / f"a_{channel}.png").touch()
    folders = [list_files(tmp_path / "full"), list_files(tmp_path / "small")]
    assert not_found(channel_files("a", folders)[1], folders) == (
        f"a_red not found as .tif, .png or .jpg; found {tmp_path}/small/a_red.png (put all four files into one folder)"
    )


# --- exposure of a sample ----------------------------------------------------------------------------------


def test_a_sample_says_which_values_its_16_bit_files_use_and_which_colours_are_misplaced(tmp_path):
    files = [tmp_path / f"a_{channel}.png" for channel in sources.CHANNELS]
    for path, colour in zip(files, [(0, 0, 90), (0, 90, 0), (90, 0, 0), (0, 90, 90)], strict=True):
        Image.new("RGB", (16, 16), colour).save(path)
    assert examine_sample(files, rgb_coded=True)[1] == {
        "ranges": [],
        "misplaced": {"a_red.png": "blue plane", "a_blue.png": "red plane", "a_yellow.png": "green and blue planes"},
    }
    for path, level in zip(files, (0, 40000, 50000, 65535), strict=True):
        Image.fromarray(np.full((16, 16), level, np.uint16)).save(path)
    assert examine_sample(files)[1] == {
        "ranges": [[level, level] for level in (0, 40000, 50000, 65535)],
        "misplaced": {},
    }
