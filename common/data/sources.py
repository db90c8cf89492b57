"""Channel files of an input folder: find them, and read each as one grey plane or refuse it.

Everything that changes the meaning of pixels (bits, inversion, orientation, planar storage, colour tables) is applied,
or refused by name. Everything else (resolution, damaged EXIF data, other metadata) is ignored. A TIFF is its first
page, never a series.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tifffile
from PIL import Image

from common.artifacts.text_tables import composed
from common.data import exposure
from common.errors import UserError, first_line

CHANNELS = ("red", "green", "blue", "yellow")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")
PICTURES = ("PNG", "JPEG")  # by content, Pillow would open a hundred others, one of them with Ghostscript
MAX_SIDE = 8192  # pixels, twice the largest real ones; a header that claims more is damaged or hostile
MAX_TEXT = 300  # bytes of a file that may be a pointer
MAX_LEVELS = 16  # reduced copies that a TIFF may have as additional pages
TIFF_COMPRESSIONS = ("NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "ZSTD")
PREDICTED = ("LZW", "DEFLATE", "ADOBE_DEFLATE", "ZSTD")  # decoders disagree on predictors of other compressions
GREY_MODES = ("1", "L", "I", "I;16", "I;16B")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
RGB_PLANES = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}
# Value of the tag -> how stored rows become the picture.
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
T = TypeVar("T")


class BadImage(Exception):
    """An image file that cannot be used, and why; stages collect these and report them together."""


# --- finding -----------------------------------------------------------------------------------------------


class Files(dict[str, Path]):
    """'Id_colour' in NFC -> image file of one folder; `others`: the same in lower case -> a file that is not usable."""

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[str, str] = {}

    @cached_property
    def spelt_otherwise(self) -> dict[str, str]:
        return {stem.casefold(): path.name for stem, path in self.items()}

    def instead_of(self, stem: str) -> str | None:
        """Return the file that the folder has instead of a missing one, with the cure."""
        if stem in self:  # but other channels of the sample are not
            return f"{self[stem]} (put all four files into one folder)"
        key = stem.casefold()
        if key in self.spelt_otherwise:
            return f"{self.spelt_otherwise[key]} (rename it to {stem}{Path(self.spelt_otherwise[key]).suffix})"
        return self.others.get(key)


def list_files(folder: Path) -> Files:
    """List every image in `folder`; earlier rows of READERS win. Files whose names begin with a dot are ignored."""
    files = Files()
    ranks: dict[str, tuple[int, str]] = {}
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    add_entry(files, ranks, entry)
    return files


def add_entry(files: Files, ranks: dict[str, tuple[int, str]], entry: os.DirEntry) -> None:
    """Add one entry of a folder to `files`; ranks : stem -> rank of the file found for it so far."""
    name = composed(entry.name)
    suffix = suffix_of(name)
    if suffix is None or not entry.is_file():  # a folder, or a pipe, which would block
        for place, letter in enumerate(name):
            if letter == ".":
                files.others[name[:place].casefold()] = f"{name} {why_not(entry)}"
        return
    stem, rank = name[: -len(suffix)], (suffixes().index(suffix), name)
    if stem not in ranks or rank < ranks[stem]:
        files[stem], ranks[stem] = Path(entry.path), rank


def suffixes() -> list[str]:
    """Return the suffixes of all readers, preferred ones first."""
    return [suffix for reader in READERS.values() for suffix in reader.suffixes]


def suffix_of(name: str) -> str | None:
    """Return the longest suffix of a file's name, in lower case, that a reader has; None if none has it."""
    name = name.lower()
    fitting = [suffix for suffix in suffixes() if name.endswith(suffix)]
    return max(fitting, key=len) if fitting else None


def why_not(entry: os.DirEntry) -> str:
    """Explain why an entry of a folder is not a usable image, with the cure."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return f"(a link to {os.readlink(entry.path)}, which is missing)"
    if entry.is_dir():
        return "(a folder)"
    if not entry.is_file():
        return "(not a regular file)"
    return "(unpack it)" if entry.name.lower().endswith(PACKED) else f"(save it as {or_list(READERS)})"


def channel_files(Id: str, folders: Sequence[Files]) -> tuple[list[Path], list[str]]:
    """Return a sample's four files from the first folder that has all of them, or else the missing names."""
    wanted = [composed(f"{Id}_{channel}") for channel in CHANNELS]
    for files in folders:
        if all(stem in files for stem in wanted):
            return [files[stem] for stem in wanted], []
    nearest: Mapping[str, Path] = max(folders, key=lambda files: sum(stem in files for stem in wanted), default={})
    return [], [stem for stem in wanted if stem not in nearest]


def not_found(lacking: list[str], folders: Sequence[Files]) -> str:
    """Name the missing files of a sample, and what the folders have instead."""
    there = [found for stem in lacking for files in folders if (found := files.instead_of(stem))]
    kinds = or_list(reader.suffixes[0] for reader in READERS.values())
    return f"{', '.join(lacking)} not found as {kinds}" + (f"; found {', '.join(there)}" if there else "")


def or_list(words: Iterable[str]) -> str:
    """Return 'a, b or c'."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The size of an image in pixels, and whether it has three colour planes."""

    width: int
    height: int
    colour: bool


@dataclass(frozen=True)
class Reader:
    """How one image format is read; a row of READERS.

    suffixes : of its files, in lower case, preferred ones first
    open : function of a path -> context manager of the open file
    header : function of the open file -> Header, without decoding it; raises BadImage if it is not an image of one
        channel
    pixels : function of the open file -> array (height, width) or (height, width, 3), uint8 or uint16, where 0 is black
        and the largest number white
    is_cut : function of a path -> whether the end of the file is missing, as after a broken download
    """

    suffixes: tuple[str, ...]
    open: Callable[[Path], AbstractContextManager[Any]]
    header: Callable[[Any], Header]
    pixels: Callable[[Any], np.ndarray]
    is_cut: Callable[[Path], bool] = lambda path: False


def reader_of(path: Path) -> Reader:
    """Return the reader of a file by its suffix; raises BadImage if there is none."""
    suffix = suffix_of(path.name)
    for reader in READERS.values():
        if suffix in reader.suffixes:
            return reader
    raise BadImage(f"has the suffix {path.suffix or 'of no format'}; expected one of {', '.join(suffixes())}")


@contextmanager
def opened(path: Path, rgb_coded: bool, square: bool = True) -> Iterator[tuple[Header, Callable[[], np.ndarray]]]:
    """Open an image of one channel; yield its header and a function that decodes it.

    Raises BadImage, also for errors inside the `with`.

    rgb_coded : whether a colour image may hold the channel
    square : whether it must be square
    """
    reader = reader_of(path)
    with explained(path), reader.open(path) as file:
        header = reader.header(file)
        check_header(header, rgb_coded, square)
        yield header, lambda: reader.pixels(file)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn every error of a decoder inside into a BadImage, and keep warnings about metadata from being printed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about metadata; damaged pixels raise
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (BadImage, UserError):
        raise
    except Exception as error:  # decoders raise many kinds; each means an unreadable file
        text = text_in(path)
        raise BadImage(
            f"cannot be read: a link to a missing file? It holds only the text {text!r}"
            if text
            else f"cannot be read ({first_line(error)})"
        ) from None


def check_header(header: Header, rgb_coded: bool, square: bool = True) -> None:
    """Refuse images that are too large, coloured if a grey one is expected, or not square if they should be."""
    if max(header.width, header.height) > MAX_SIDE:
        raise BadImage(f"claims {header.width} x {header.height} px; at most {MAX_SIDE} are accepted")
    if square and header.width != header.height:
        raise BadImage(f"is not square ({header.width} x {header.height} px)")
    if header.colour and not rgb_coded:
        raise BadImage("is a colour image; expected one grey channel per file")


def text_in(path: Path) -> str | None:
    """Return the text of a small text file: links and large files copied without their content leave such files."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT + 1)
        text = " ".join(content.decode().split())
    except (OSError, ValueError):
        return None
    return text if len(content) <= MAX_TEXT and text.isprintable() else None


def read_side(path: Path, rgb_coded: bool = False) -> int:
    """Return the side of an image in pixels without decoding it; raises BadImage if it is not usable."""
    with opened(path, rgb_coded) as (header, _):
        return header.width


def read_pixels(path: Path, rgb_coded: bool = False, square: bool = True) -> np.ndarray:
    """Decode an image fully into a (height, width) array, or (height, width, 3) if it is rgb_coded; raises BadImage."""
    with opened(path, rgb_coded, square) as (header, decode):
        pixels = decode()
    if pixels.shape[:2] != (header.height, header.width):
        raise BadImage(f"decodes to {pixels.shape}, its header says {header.height} x {header.width}")
    return pixels


def read_channel(path: Path, channel: str, rgb_coded: bool = False) -> np.ndarray:
    """Decode one channel fully into a (side, side) uint8 or uint16 array.

    rgb_coded : the Human Protein Atlas publishes each channel as a colour JPEG, of which the planes for `channel` are
        used (yellow: the mean of R and G). A grey conversion would dim the channels unequally.
    Raises BadImage, also for colour files if grey ones are expected.
    """
    return channel_plane(read_pixels(path, rgb_coded), channel)


def channel_plane(pixels: np.ndarray, channel: str) -> np.ndarray:
    """Return the plane of a channel, (side, side), from an image that may be colour-coded, (side, side, 3)."""
    if pixels.ndim == 2:
        return pixels
    planes = [pixels[..., plane].astype(np.uint32) for plane in RGB_PLANES[channel]]
    return ((sum(planes[1:], planes[0]) + len(planes) // 2) // len(planes)).astype(pixels.dtype)


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored rows, (height, width) or (height, width, 3), by their orientation tag; unknown values count as 1."""
    return np.ascontiguousarray(ORIENTATIONS[orientation](image)) if orientation in ORIENTATIONS else image


def table_kind(table: np.ndarray, entries: int) -> str:
    """Return the kind of a colour table, (n, 3): 'grey' levels, 'colour', or a display 'ramp'.

    With a ramp, the indices themselves are the grey levels. It has an entry for each of the `entries` values, none
    darker in any colour than the one before.
    """
    if (table == table[:, :1]).all():
        return "grey"
    return "ramp" if len(table) == entries and (np.diff(table.astype(int), axis=0) >= 0).all() else "colour"


def through_table(indices: np.ndarray, table: np.ndarray, kind: str) -> np.ndarray:
    """Look indices up in a colour table, (n, 3) uint8, of kind grey or colour; indices beyond it are black."""
    whole = np.zeros((max(len(table), int(indices.max()) + 1), 3), np.uint8)
    whole[: len(table)] = table
    return whole[:, 0][indices] if kind == "grey" else whole[indices]


# --- PNG and JPEG ------------------------------------------------------------------------------------------


def open_picture(path: Path) -> Image.Image:
    """Open a PNG or JPEG. Pillow refuses truncated files; OpenCV silently fills them up."""
    return Image.open(path, formats=PICTURES)


def picture_header(image: Image.Image) -> Header:
    if image.mode in ALPHA_MODES:
        raise BadImage("has an alpha channel; save it without")
    frames = getattr(image, "n_frames", 1)
    if image.format == "PNG" and frames > 1:
        raise BadImage(f"has {frames} frames; expected one channel per file")
    grey = image.mode in GREY_MODES or (image.mode == "P" and picture_table(image)[1] != "colour")
    return Header(*image.size, colour=not grey)


def picture_table(image: Image.Image) -> tuple[np.ndarray, str]:
    table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return table, table_kind(table, 256)


def picture_pixels(image: Image.Image) -> np.ndarray:
    if image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if image.mode == "1":
        pixels = pixels.astype(np.uint8) * 255
    elif image.mode == "P":
        table, kind = picture_table(image)
        pixels = pixels if kind == "ramp" else through_table(pixels, table, kind)
    elif pixels.dtype != np.uint8:
        pixels = pixels.astype(np.uint16)  # older releases of Pillow return 16 bits as 32
    return oriented(pixels, exif_orientation(image))


def exif_orientation(image: Image.Image) -> int:
    """Return a decoded picture's EXIF orientation, or 1 (unchanged) if it cannot be read."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # its parser raises many kinds
        return 1


# --- TIFF --------------------------------------------------------------------------------------------------


def tiff_header(tiff: tifffile.TiffFile) -> Header:
    page = only_page(tiff)
    check_page(page)
    colour = page.samplesperpixel == 3 or tiff_table(page)[1] == "colour"
    return Header(page.imagewidth, page.imagelength, colour)


def only_page(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    """Return the page of a TIFF with one image; additional pages may be smaller copies of it. Raises BadImage."""
    page, pages = tiff.pages.first, len(tiff.pages)
    if pages > 1 and not (pages <= MAX_LEVELS and all(is_reduced(further) for further in tiff.pages[1:])):
        raise BadImage(f"has {pages} pages; expected one channel per file")
    images = min(claimed_images(tiff), room(tiff))
    if images > 1:
        raise BadImage(f"has {images} images in one page; expected one channel per file")
    return page


def is_reduced(page: tifffile.TiffPage | tifffile.TiffFrame) -> bool:
    """Tell whether a page is a smaller copy of another one."""
    return isinstance(page, tifffile.TiffPage) and page.is_reduced


def claimed_images(tiff: tifffile.TiffFile) -> int:
    """Return how many images the first page claims to hold: tifffile, ImageJ and MetaMorph write such stacks."""
    page = tiff.pages.first
    try:
        if page.is_shaped:
            return int(np.prod((tiff.shaped_metadata or ())[0]["shape"])) // page.size
        if page.is_imagej:
            return int((tiff.imagej_metadata or {})["images"])
        return page.tags[33629].count if page.is_stk else 1
    except Exception:  # a damaged description is harmless
        return 1


def room(tiff: tifffile.TiffFile) -> int:
    """Return for how many images like the first page a TIFF has contiguous data.

    Programs that split stacks keep the old description.
    """
    page = tiff.pages.first
    return (tiff.filehandle.size - page.dataoffsets[0]) // page.nbytes if page.is_contiguous and page.nbytes else 1


def check_page(page: tifffile.TiffPage) -> None:
    """Refuse, with the reason, pages that are not one channel, or that programs decode differently."""
    check_values(page)
    check_coding(page)
    sides = (page.imagewidth, page.imagelength, page.tilewidth, page.tilelength)
    if max(sides) > MAX_SIDE or page.imagedepth != 1 or 0 in page.shaped:
        raise BadImage(f"claims {' x '.join(map(str, page.shape))} px; at most {MAX_SIDE} x {MAX_SIDE} are accepted")
    parts, kind = int(np.prod(page.chunked)), "tile" if page.is_tiled else "strip"
    data = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    empty = next((k for k in range(parts) if k >= len(data) or 0 in data[k]), None)
    if empty is not None:
        raise BadImage(f"is cut short: {kind} {empty} of 0 to {parts - 1} has no data")


def name_of(value: object) -> str:
    """Return the name of a tag's value, or the number if it has none."""
    return getattr(value, "name", str(value))


def check_values(page: tifffile.TiffPage) -> None:
    """Refuse values that are not grey levels of at most 16 bits, one or three per pixel, with a known black."""
    compression, photometric = name_of(page.compression), name_of(page.photometric)
    if compression not in TIFF_COMPRESSIONS:
        raise BadImage(f"is compressed as {compression}; expected one of {', '.join(TIFF_COMPRESSIONS)}")
    if page.dtype not in (np.bool_, np.uint8, np.uint16) or not isinstance(page.bitspersample, int):
        found = page.dtype or f"{page.bitspersample} bits of {name_of(page.sampleformat)}"
        raise BadImage(f"holds {found}; expected unsigned integers of at most 16 bits")
    if any(kind in (1, 2) for kind in page.extrasamples):
        raise BadImage("has an alpha channel; save it without")
    if page.samplesperpixel not in (1, 3):
        raise BadImage(f"has {page.samplesperpixel} values per pixel; expected one")
    if "PhotometricInterpretation" not in page.tags:
        raise BadImage("does not say whether 0 is black (it has no PhotometricInterpretation tag); save it again")
    expected = ("MINISBLACK", "MINISWHITE", "PALETTE") if page.samplesperpixel == 1 else ("RGB", "MINISBLACK")
    if photometric not in expected:
        raise BadImage(f"is stored as {photometric} with {page.samplesperpixel} values per pixel; expected grey levels")


def check_coding(page: tifffile.TiffPage) -> None:
    """Refuse codings of the pixels that programs read differently."""
    compression = name_of(page.compression)
    if page.predictor != 1 and not (page.predictor == 2 and compression in PREDICTED and page.bitspersample in (8, 16)):
        raise BadImage(
            f"has the predictor {name_of(page.predictor)} for {page.bitspersample} bits compressed as {compression}, "
            "which programs read differently; save it again"
        )
    if page.fillorder not in (1, 2) or page.planarconfig not in (1, 2):
        raise BadImage(
            f"has the FillOrder {name_of(page.fillorder)} and the PlanarConfiguration {name_of(page.planarconfig)}; "
            "expected 1 or 2"
        )


def tiff_table(page: tifffile.TiffPage) -> tuple[np.ndarray | None, str]:
    """Return a page's colour table, (n, 3) uint8, and its kind; (None, 'grey') without one."""
    if page.photometric != tifffile.PHOTOMETRIC.PALETTE:
        return None, "grey"
    table = np.asarray(page.colormap).T
    table = (table >> 8 if table.max() > 255 else table).astype(np.uint8)  # some programs write 8 bits
    return table, table_kind(table, 2**page.bitspersample)


def tiff_pixels(tiff: tifffile.TiffFile) -> np.ndarray:
    """Decode the first page, never the series that it may belong to."""
    return page_pixels(tiff.pages.first)


def page_pixels(page: tifffile.TiffPage) -> np.ndarray:
    """Decode one page according to its tags, to (height, width) or (height, width, 3)."""
    stored = page.asarray(squeeze=False, maxworkers=1)  # (planes or 1, 1, height, width, 1 or values per pixel)
    image = np.concatenate(list(stored[:, 0]), axis=-1) if len(stored) > 1 else stored[0, 0]
    image = image[..., 0] if image.shape[-1] == 1 else image
    table, kind = tiff_table(page)
    if table is not None and kind != "ramp":
        image = through_table(image.astype(np.uint16), table, kind)
    else:
        image = full_range(image, page.bitspersample)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        image = np.iinfo(image.dtype).max - image
    return oriented(image, page.tags.valueof("Orientation", 1))


def full_range(image: np.ndarray, bits: int) -> np.ndarray:
    """Stretch values of 1 to 7 bits over 8 bits, of 9 to 15 over 16, so that the largest becomes white."""
    if bits in (8, 16):
        return image
    kind = np.uint8 if bits < 8 else np.uint16
    largest = 2**bits - 1
    return ((image.astype(np.uint32) * np.iinfo(kind).max + largest // 2) // largest).astype(kind)


def tiff_is_cut(path: Path) -> bool:
    """Tell from a TIFF's offsets whether the end of the file is missing."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            return max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > path.stat().st_size
    except Exception:  # its decoders raise many kinds
        return True


# --- all formats -------------------------------------------------------------------------------------------


def lacks_end(mark: bytes) -> Callable[[Path], bool]:
    """Return a function that tells whether a file's last bytes are without its format's end mark."""

    def is_cut(path: Path) -> bool:
        with open(path, "rb") as file:
            file.seek(-min(64, path.stat().st_size), os.SEEK_END)
            return mark not in file.read()

    return is_cut


# If a sample has files of several formats, the first of these is read, and of its suffixes the first.
READERS: dict[str, Reader] = {
    "TIFF": Reader(
        (".tif", ".tiff", ".ome.tif", ".ome.tiff"), tifffile.TiffFile, tiff_header, tiff_pixels, tiff_is_cut
    ),
    "PNG": Reader((".png",), open_picture, picture_header, picture_pixels, lacks_end(b"IEND")),
    "JPEG": Reader((".jpg", ".jpeg"), open_picture, picture_header, picture_pixels, lacks_end(b"\xff\xd9")),
}


def looks_cut_short(path: Path) -> bool:
    """Tell whether the end of a file is missing, as after a broken download."""
    return reader_of(path).is_cut(path)


# --- samples -----------------------------------------------------------------------------------------------


def check_sample(files: list[Path], rgb_coded: bool = False) -> int:
    """Return the side of a sample in pixels after reading its four headers; raises BadImage with the file."""
    return one_side(files, per_channel(lambda path, _: read_side(path, rgb_coded), files))


def read_sample(files: list[Path], rgb_coded: bool = False) -> list[np.ndarray]:
    """Decode the four channels of a sample and check that they have one size; raises BadImage with the file."""
    return examine_sample(files, rgb_coded)[0]


def examine_sample(files: Sequence[Path], rgb_coded: bool = False) -> tuple[list[np.ndarray], dict]:
    """Return the result of `read_sample`, and the files' exposure (see `exposure.judge`)."""
    pixels = per_channel(lambda path, _: read_pixels(path, rgb_coded), files)
    planes = [channel_plane(image, channel) for image, channel in zip(pixels, CHANNELS, strict=True)]
    one_side(files, [len(plane) for plane in planes])
    misplaced = {
        path.name: place
        for path, channel, image in zip(files, CHANNELS, pixels, strict=True)
        if image.ndim == 3 and (place := exposure.signal_elsewhere(image, RGB_PLANES[channel]))
    }
    return planes, {
        "ranges": [exposure.used_range(plane) for plane in planes if plane.dtype == np.uint16],
        "misplaced": misplaced,
    }


def per_channel(read: Callable[[Path, str], T], files: Sequence[Path]) -> list[T]:
    """Call `read(path, channel)` for each of a sample's files; a BadImage gets the file's name."""
    results = []
    for path, channel in zip(files, CHANNELS, strict=True):
        try:
            results.append(read(path, channel))
        except BadImage as error:
            raise BadImage(f"{path} {error}") from None
    return results


def one_side(files: Sequence[Path], sides: list[int]) -> int:
    """Return the common side of a sample's channels in pixels; raises BadImage if they differ."""
    if len(set(sides)) > 1:
        raise BadImage(
            f"{files[0].parent}: channels of different sizes {sorted(set(sides))} px: "
            f"{', '.join(path.name for path in files)}"
        )
    return sides[0]
