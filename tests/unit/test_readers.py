"""Every row of READERS: the rules for a new image format, and the lines of CONTRIBUTING.md that add one."""

import numpy as np
import pytest
from PIL import Image

from common.data import sources
from common.data.sources import (
    CHANNELS,
    READERS,
    BadImage,
    channel_files,
    list_files,
    looks_cut_short,
    not_found,
    read_channel,
    read_sample,
    read_side,
)
from tests.contributing import example

IMAGE = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
# How a grey image is written in each format. A JPEG's values are nearly those that were written.
WRITERS = {
    "TIFF": lambda path: Image.fromarray(IMAGE).save(path, "TIFF"),
    "PNG": lambda path: Image.fromarray(IMAGE).save(path, "PNG"),
    "JPEG": lambda path: Image.fromarray(IMAGE).save(path, "JPEG", quality=100),
}
ROWS = [(name, suffix) for name, reader in READERS.items() for suffix in reader.suffixes]


@pytest.mark.parametrize(("name", "suffix"), ROWS)
def test_a_file_is_found_and_read_by_its_suffix_in_any_case(tmp_path, name, suffix):
    for spelt in (suffix, suffix.upper()):
        path = tmp_path / f"a_red{spelt}"
        WRITERS[name](path)
        assert list_files(tmp_path)["a_red"] == path
        assert read_side(path) == 64
        np.testing.assert_allclose(read_channel(path, "red").astype(int), IMAGE, atol=0 if name != "JPEG" else 3)
        assert not looks_cut_short(path)
        path.unlink()


@pytest.mark.parametrize(("name", "suffix"), ROWS)
def test_damaged_files_are_refused_in_words(tmp_path, name, suffix):
    path = tmp_path / f"a{suffix}"
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-100])
    assert looks_cut_short(path)
    for content in (path.read_bytes()[:1000], b"not an image", b""):
        path.write_bytes(content)
        with pytest.raises(BadImage, match="cannot be read"):
            read_channel(path, "red")


def test_the_first_row_and_its_first_suffix_win(tmp_path):
    for name, suffix in reversed(ROWS):
        WRITERS[name](tmp_path / f"a_red{suffix}")
        assert list_files(tmp_path)["a_red"].name == f"a_red{suffix}"


@pytest.mark.parametrize("name", ["a.bmp", "a.tif.gz", "a"])
def test_a_suffix_that_no_row_has_is_an_error_that_names_those_there_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"BM")
    for read in (read_side, looks_cut_short):
        with pytest.raises(
            BadImage, match=r"^has the suffix .*; expected one of \.tif, \.tiff, .*, \.png, \.jpg, \.jpeg$"
        ):
            read(tmp_path / name)
    assert not list_files(tmp_path)


def test_the_lines_of_contributing_add_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "READERS", dict(READERS))
    assert "a_red.npy (save it as TIFF, PNG or JPEG)" in missing(tmp_path)
    exec(example("a reader (image format)"), {**vars(sources)})
    files, lacking = channel_files("a", [list_files(tmp_path)])
    assert not lacking and all((plane == IMAGE).all() for plane in read_sample(files))
    np.save(tmp_path / "a_red.npy", IMAGE[:, :9])
    with pytest.raises(BadImage, match=r"a_red.npy is not square \(9 x 64 px\)"):
        read_sample(files)
    (tmp_path / "a_red.npy").rename(tmp_path / "a_red.bmp")
    assert "not found as .tif, .png, .jpg or .npy; found a_red.bmp (save it as TIFF, PNG, JPEG or NPY)" in missing(
        tmp_path, write=False
    )


def missing(folder, write=True) -> str:
    """Write a sample as .npy files; return the messages for those that cannot be read."""
    if write:
        for channel in CHANNELS:
            np.save(folder / f"a_{channel}.npy", IMAGE)
    folders = [list_files(folder)]
    return not_found(channel_files("a", folders)[1], folders)
