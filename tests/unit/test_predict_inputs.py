"""New images: what is found, what each format means, what is refused and how."""

import builtins
import os
import re

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from common.data import stacks
from common.data.sources import CHANNELS, BadImage
from common.data.stacks import channel_order, in_micrometres, ome_metadata, opened_stack, parse_channels
from common.errors import UserError
from common.predict.inputs import InputOptions, check, list_images, read_image, refuse_bad
from tests import clothes

RNG = np.random.default_rng(0)
FIELDS = {Id: RNG.integers(0, 256, (4, 40, 56), dtype=np.uint8) for Id in ("a", "b one")}
NUMBERS = {"red": "1", "green": "3", "blue": "0", "yellow": "2"}  # of the channels in clothes.ORDER


def found(place, **options):
    options = InputOptions(**options)
    return check(list_images(place, options), options, 1)


@pytest.mark.parametrize("name", clothes.CLOTHES)
def test_every_format_gives_the_same_planes(tmp_path, name):
    if name == "OME-Zarr":
        pytest.importorskip("zarr")
    place = clothes.CLOTHES[name](tmp_path, FIELDS)
    images = found(place, channels=NUMBERS if name == "pages" else None)
    assert [image.Id for image in images] == list(FIELDS)
    for image in images:
        assert (image.fault, image.height, image.width, image.pixel_size) == ("", 40, 56, None)
        planes, _ = read_image(image)
        for plane, expected in zip(planes, FIELDS[image.Id], strict=True):
            assert np.array_equal(plane, expected if plane.dtype == np.uint8 else clothes.full_range(expected))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_both_versions_of_ome_zarr_are_read(tmp_path, version):
    pytest.importorskip("zarr")
    clothes.ome_zarrs(tmp_path, FIELDS, pixel_size=0.3, version=version)
    for image in found(tmp_path):
        assert (image.fault, round(image.pixel_size, 6)) == ("", 0.3)
        assert all(np.array_equal(*pair) for pair in zip(read_image(image)[0], FIELDS[image.Id], strict=True))


@pytest.mark.parametrize("write", [clothes.ome_tiffs, clothes.imagej_tiffs, clothes.ome_zarrs])
def test_the_pixel_size_is_read_and_a_given_one_goes_first(tmp_path, write):
    if write is clothes.ome_zarrs:
        pytest.importorskip("zarr")
    write(tmp_path, FIELDS, pixel_size=0.25)
    assert [round(image.pixel_size, 6) for image in found(tmp_path)] == [0.25, 0.25]
    assert [image.pixel_size for image in found(tmp_path, pixel_size=0.5)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [("80", "nm", 0.08), ("0.1", "µm", 0.1), ("0.1", "\\u00B5m", 0.1), ("1", "pixel", None), ("x", "um", None)],
)
def test_lengths_are_brought_to_micrometres(value, unit, expected):
    assert in_micrometres(value, unit) == (pytest.approx(expected) if expected else None)


@pytest.mark.parametrize("size", [1e-6, 1e5, float("nan")])
def test_a_pixel_size_that_no_microscope_has_does_not_count(size):
    assert stacks.square_pixel(size, size) is None


def test_pixels_that_are_not_square_are_refused():
    with pytest.raises(BadImage, match=r"pixels of 0.1 x 0.2 micrometres; expected square"):
        stacks.square_pixel(0.1, 0.2)


def test_channels_are_known_by_the_words_of_laboratories():
    assert channel_order(["DAPI", "GFP target", "Tubulin", "ER", "green"], None) == (2, 4, 0, 3)
    assert channel_order(["c0", "c1", "c2"], {"red": "2", "green": "c0", "blue": "1"}) == (2, 0, 1, None)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["red", "green", "blue"], None, r"no channel called yellow; it has 3 channels.* or --missing yellow"),
        (["", "", ""], None, r"no channel called red; it has 3 channels: 0, 1, 2\. Say which is which"),
        (["red", "Tubulin", "green"], None, r"has 2 channels called red"),
        (["a", "b"], {"red": "7"}, r"has no single channel '7' for red"),
    ],
)
def test_unclear_channels_are_refused_with_the_cure(names, given, message):
    with pytest.raises(BadImage, match=message):
        channel_order(names, given)


@pytest.mark.parametrize("text", ["red", "red=0,red=1", "pink=0", "red=0,green=0", "red="])
def test_channels_that_say_nothing_are_refused(text):
    with pytest.raises(ValueError, match="expected a different channel for each colour"):
        parse_channels(text)


def test_a_missing_channel_is_read_as_none(tmp_path):
    clothes.pngs(tmp_path, FIELDS)
    (tmp_path / "a_yellow.png").unlink()
    images = found(tmp_path)
    assert "a_yellow not found" in images[0].fault and "--missing yellow" in images[0].fault
    images = found(tmp_path, missing=("yellow",))
    assert [image.fault for image in images] == ["", ""] and images[0].missing == ("yellow",)
    assert read_image(images[0])[0][3] is None


def test_colours_that_channels_does_not_list_are_missing(tmp_path):
    clothes.pages(tmp_path, FIELDS)
    (image, _) = found(tmp_path, channels={"red": "1", "green": "3"})
    assert image.missing == ("blue", "yellow") and image.order == (1, 3, None, None)
    (image, _) = found(tmp_path, channels={"red": "1"})
    assert "no channel for green, the protein" in image.fault


def test_a_table_may_name_missing_channels_and_pixel_sizes_per_row(tmp_path):
    place = clothes.csv_of_paths(tmp_path, FIELDS)
    table = pd.read_csv(place).assign(missing=["", "blue yellow"], pixel_size=["0.1", ""])
    table.loc[1, "blue"] = ""
    table.to_csv(place, index=False)
    first, second = found(place, pixel_size=0.2)
    assert (first.missing, first.pixel_size) == ((), 0.1)
    assert (second.missing, second.pixel_size, second.fault) == (("blue", "yellow"), 0.2, "")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("red", "", "a has no path for red"),
        ("red", "nowhere.png", r"nowhere\.png is missing"),
        ("red", "images.csv", "has the suffix .csv"),
        ("missing", "pink", "missing is 'pink'"),
        ("missing", "green", "green, the channel of the protein, cannot be missing"),
        ("pixel_size", "small", "'small' is no number of micrometres"),
    ],
)
def test_a_bad_row_of_a_table_is_named_among_good_ones(tmp_path, column, value, message):
    place = clothes.csv_of_paths(tmp_path, FIELDS)
    table = pd.read_csv(place, dtype=str, keep_default_na=False)
    if column not in table:
        table[column] = ""
    table.loc[0, column] = value
    table.to_csv(place, index=False)
    bad, good = found(place)
    assert re.search(message, bad.fault) and not good.fault


def test_nothing_but_regular_files_is_opened(tmp_path):
    place = clothes.csv_of_paths(tmp_path, FIELDS)
    os.mkfifo(tmp_path / "pipe.png")
    table = pd.read_csv(place)
    table.loc[0, "red"] = "pipe.png"
    table.to_csv(place, index=False)
    assert found(place)[0].fault.endswith("pipe.png is missing")


def test_bad_images_are_listed_together_and_kept_out_only_on_request(tmp_path, capsys):
    clothes.pngs(tmp_path, FIELDS)
    Image.fromarray(FIELDS["a"][0][:20]).save(tmp_path / "a_red.png")  # another size
    (tmp_path / "b one_blue.png").write_bytes(b"\x89PNG nothing")
    clothes.pngs(tmp_path, {"good": FIELDS["a"]})
    images, out = found(tmp_path), tmp_path / "out"
    with pytest.raises(UserError) as caught:
        refuse_bad(images, out, InputOptions())
    message = str(caught.value)
    assert "2 of 3 images cannot be used" in message and "--keep-going" in message
    assert "a: channels of different sizes: a_red.png 56 x 20" in message and "b one_blue.png cannot be read" in message
    assert pd.read_csv(out / "bad_files.csv")["Id"].tolist() == ["a", "b one"]
    refuse_bad(images, out, InputOptions(keep_going=True))
    assert "warning: 2 of 3" in capsys.readouterr().out


def test_one_sample_in_two_formats_and_files_without_a_colour_are_refused(tmp_path):
    clothes.pngs(tmp_path, {"a": FIELDS["a"]})
    clothes.ome_tiffs(tmp_path, {"a": FIELDS["a"]})
    Image.fromarray(FIELDS["a"][0]).save(tmp_path / "overview.png")
    faults = {image.fault for image in found(tmp_path)}
    assert "a has both a file per channel and one with all (a.ome.tif)" in faults
    assert any("overview.png does not end in a colour" in fault for fault in faults)


def test_an_empty_folder_says_what_is_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"has no images; expected <Id>_red.tif.*found notes.txt"):
        list_images(tmp_path, InputOptions())
    for name in ("a.png", "a.ome.tif"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"{name} is a single image; give the folder"):
            list_images(tmp_path / name, InputOptions())
    with pytest.raises(UserError, match="is missing; expected a folder of images, or a CSV"):
        list_images(tmp_path / "nowhere", InputOptions())


def test_a_stack_through_depth_is_refused(tmp_path):
    deep = np.zeros((3, 4, 40, 56), np.uint8)
    metadata = {"axes": "ZCYX", "Channel": {"Name": list(CHANNELS)}}
    tifffile.imwrite(tmp_path / "a.ome.tif", deep, photometric="minisblack", metadata=metadata)
    tifffile.imwrite(tmp_path / "b.tif", deep, imagej=True, metadata={"axes": "ZCYX"})
    one, other = found(tmp_path)
    assert "has 3 planes in depth and 1 in time" in one.fault and "3 slices" in other.fault


def test_floating_point_and_colour_pages_are_refused_as_in_stage_01(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 40, 56), np.float32), photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((40, 56, 3), np.uint8), photometric="rgb")
    one, other = found(tmp_path)
    assert "holds float32; expected unsigned integers" in one.fault and "colour pages" in other.fault


def test_the_pages_of_ome_xml_may_be_in_any_order(tmp_path):
    planes = FIELDS["a"]
    clothes.ome_tiffs(tmp_path, {"a": planes})
    text = tifffile.TiffFile(tmp_path / "a.ome.tif").pages[0].description
    blocks = "".join(f'<TiffData IFD="{page}" FirstC="{c}" PlaneCount="1"/>' for c, page in enumerate((3, 2, 1, 0)))
    start, end = text.index("<TiffData"), text.rindex("</Pixels>")
    assert ome_metadata(text[:start] + blocks + text[end:]).order == (3, 2, 1, 0)
    twice = blocks.replace('IFD="2"', 'IFD="3"')
    with pytest.raises(BadImage, match="does not say which page is which channel"):
        ome_metadata(text[:start] + twice + text[end:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("<OME", "<!DOCTYPE x><OME", 1), "entities"),
        (lambda text: text[:-9], "damaged OME-XML"),
        (lambda text: text.replace('SizeT="1"', 'SizeT="9"'), "9 in time"),
    ],
)
def test_hostile_ome_xml_is_refused(tmp_path, change, message):
    clothes.ome_tiffs(tmp_path, {"a": FIELDS["a"]})
    with pytest.raises(BadImage, match=message):
        ome_metadata(change(tifffile.TiffFile(tmp_path / "a.ome.tif").pages[0].description))


def test_planes_under_one_page_are_read_in_their_byte_order(tmp_path):
    planes = clothes.full_range(FIELDS["a"])
    metadata = {"axes": "CYX", "channels": list(CHANNELS)}
    for order in "<>":
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, planes, photometric="minisblack", metadata=metadata, truncate=True, byteorder=order)
        with opened_stack(path) as (header, decode):
            assert header.names == CHANNELS
            assert all(np.array_equal(decode(k), planes[k]) for k in range(4))


def test_zarr_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.ome.zarr").mkdir()
    real = builtins.__import__

    def absent(name, *rest):
        if name == "zarr":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="OME-Zarr needs the package zarr; run: pip install zarr"):
        found(tmp_path)


def test_a_zarr_that_points_out_of_its_folder_is_refused(tmp_path):
    zarr = pytest.importorskip("zarr")
    clothes.ome_zarrs(tmp_path, {"a": FIELDS["a"]})
    group = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r+")
    scales = group.attrs["multiscales"]
    scales[0]["datasets"][0]["path"] = "../../secret"
    group.attrs["multiscales"] = scales
    assert "has its pixels outside of its folder" in found(tmp_path)[0].fault


def test_an_image_that_changes_gets_another_state(tmp_path):
    clothes.pngs(tmp_path, FIELDS)
    before = {image.Id: image.state for image in found(tmp_path)}
    Image.fromarray(FIELDS["a"][1]).save(tmp_path / "a_red.png")
    after = {image.Id: image.state for image in found(tmp_path)}
    assert before["a"] != after["a"] and before["b one"] == after["b one"]
