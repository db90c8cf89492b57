"""Files with all channels of one sample: OME-TIFF, ImageJ TIFF, other TIFFs of several pages, OME-Zarr.

Each plane is accepted or refused by the same rules as a file with one channel (see `sources`). A stack through depth or
time is refused: which plane counts is the user's decision. Names of channels, and the size of a pixel, come from the
file's own metadata, which may be missing or wrong but never changes pixels.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from common.data import sources
from common.data.sources import CHANNELS, BadImage
from common.errors import UserError

MAX_PLANES = 64  # of a file; more are a stack through depth or time
MAX_METADATA = 2**20  # characters
MICROMETRES = {"nm": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0}
MICROMETRES |= {"micrometre": 1.0, "nanometer": 1e-3, "nanometre": 1e-3, "mm": 1e3, "millimeter": 1e3, "\\u00b5m": 1.0}
PLAUSIBLE = (0.005, 50.0)  # micrometres of a pixel; anything else is a default or a mistake
# What other programs and laboratories call the channels, in lower case, without blanks and signs.
SYNONYMS = {
    "red": ("red", "microtubules", "microtubule", "tubulin"),
    "green": ("green", "protein", "antibody", "proteinofinterest", "target"),
    "blue": ("blue", "nucleus", "nuclei", "dapi", "hoechst", "dna"),
    "yellow": ("yellow", "er", "endoplasmicreticulum", "reticulum", "calreticulin"),
}


@dataclass(frozen=True)
class StackHeader:
    """What a file says about itself.

    width, height : in pixels
    names : of its channels in their order, '' where unknown
    pixel_size : in micrometres; None if it does not say
    """

    width: int
    height: int
    names: tuple[str, ...]
    pixel_size: float | None = None


@dataclass(frozen=True)
class StackReader:
    """How one format is read; a row of STACK_READERS.

    suffixes : in lower case
    open : function of a path -> context manager of the open file
    header : function of the open file -> StackHeader, without decoding it; raises BadImage
    plane : function of the open file and the number of a channel -> (height, width) uint8 or uint16
    """

    suffixes: tuple[str, ...]
    open: Callable[[Path], AbstractContextManager[Any]]
    header: Callable[[Any], StackHeader]
    plane: Callable[[Any, int], np.ndarray]


def stack_suffix(name: str) -> str | None:
    """Return the longest suffix of a file's name, in lower case, that a row of STACK_READERS has; None without one."""
    fitting = [s for reader in STACK_READERS.values() for s in reader.suffixes if name.lower().endswith(s)]
    return max(fitting, key=len) if fitting else None


@contextmanager
def opened_stack(path: Path) -> Iterator[tuple[StackHeader, Callable[[int], np.ndarray]]]:
    """Open a file with several channels; yield its header and a function that decodes the plane of a channel.

    Raises BadImage, also for errors inside the `with`; UserError if the format needs a package that is not installed.
    """
    suffix = stack_suffix(path.name)
    reader = next((reader for reader in STACK_READERS.values() if suffix in reader.suffixes), None)
    if reader is None:
        known = [s for reader in STACK_READERS.values() for s in reader.suffixes]
        raise BadImage(f"has the suffix {path.suffix or 'of no format'}; expected one of {', '.join(known)}")
    with sources.explained(path), reader.open(path) as file:
        header = reader.header(file)
        if max(header.width, header.height) > sources.MAX_SIDE or min(header.width, header.height) < 1:
            raise BadImage(f"claims {header.width} x {header.height} px; at most {sources.MAX_SIDE} are accepted")
        yield header, lambda number: checked_plane(reader.plane(file, number), header)


def checked_plane(plane: np.ndarray, header: StackHeader) -> np.ndarray:
    """Refuse a plane of another shape than the header's, or a coloured one."""
    if plane.shape != (header.height, header.width):
        raise BadImage(f"decodes to {plane.shape}, its header says {header.height} x {header.width}")
    return plane


# --- which channel is which --------------------------------------------------------------------------------


def parse_channels(text: str) -> dict[str, str]:
    """Parse 'red=2,green=0,blue=DAPI' into colour -> number (from 0) or name of a channel; raises ValueError."""
    pairs = [part.partition("=") for part in text.split(",")]
    found = {colour.strip(): place.strip() for colour, _, place in pairs}
    unknown = [colour for colour in found if colour not in CHANNELS]
    if unknown or len(found) < len(pairs) or not all(found.values()) or len(set(found.values())) < len(found):
        raise ValueError(
            f"expected a different channel for each colour, for example red=2,green=0,blue=1,yellow=3; found {text!r}"
        )
    return found


def channel_order(
    names: Sequence[str], given: Mapping[str, str] | None, missing: Sequence[str] = ()
) -> tuple[int | None, ...]:
    """Return the number of each colour's channel in a file, in the order of CHANNELS; None for `missing` ones.

    names : of the file's channels; given : colour -> number or name (see `parse_channels`), or None to go by the names.
        Colours that are not given count as missing.
    Raises BadImage if that is not clear.
    """
    return tuple(
        None
        if colour in missing or given is not None and colour not in given
        else given_channel(names, given[colour], colour)
        if given is not None
        else named_channel(names, colour)
        for colour in CHANNELS
    )


def given_channel(names: Sequence[str], place: str, colour: str) -> int:
    """Return the number of the channel that the user gave for a colour, by number or name."""
    same = [k for k, name in enumerate(names) if name.casefold() == place.casefold()]
    if len(same) == 1:
        return same[0]
    if place.isdecimal() and int(place) < len(names):
        return int(place)
    raise BadImage(f"has no single channel {place!r} for {colour}; {described(names)}")


def named_channel(names: Sequence[str], colour: str) -> int:
    """Return the number of the channel whose name means a colour."""
    same = [k for k, name in enumerate(names) if re.sub(r"[\W_]", "", name.casefold()) in SYNONYMS[colour]]
    if len(same) == 1:
        return same[0]
    raise BadImage(
        f"has {'no channel' if not same else f'{len(same)} channels'} called {colour}; {described(names)}. Say "
        f"which is which, for example --channels red=0,green=1,blue=2,yellow=3"
        + (f", or --missing {colour}" if not same and colour != "green" else "")
    )


def described(names: Sequence[str]) -> str:
    """Describe the channels of a file."""
    listed = ", ".join(f"{k} {name[:40]!r}" if name else str(k) for k, name in enumerate(names))
    return f"it has {len(names)} channels: {listed}"


def plausible(size: float | None) -> float | None:
    """Return a pixel's size in micrometres, or None for a value that no microscope has."""
    return size if size is not None and math.isfinite(size) and PLAUSIBLE[0] <= size <= PLAUSIBLE[1] else None


def square_pixel(across: float | None, down: float | None) -> float | None:
    """Return the side of a pixel in micrometres; None if it is not known. Raises BadImage if it is not square."""
    across, down = plausible(across), plausible(down)
    if across and down and abs(across / down - 1) > 0.01:
        raise BadImage(f"has pixels of {across:g} x {down:g} micrometres; expected square ones")
    return across


def in_micrometres(value: str | None, unit: str | None) -> float | None:
    """Return a length in micrometres; None for text that is none, and for units that are not lengths."""
    factor = MICROMETRES.get((unit or "").strip().casefold())
    try:
        return float(value or "") * factor if factor else None
    except ValueError:
        return None


# --- TIFF --------------------------------------------------------------------------------------------------


def stack_pages(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Return the pages of a TIFF that are whole images, each checked like a file with one channel."""
    if len(tiff.pages) > MAX_PLANES:
        raise BadImage(f"has {len(tiff.pages)} pages; expected one for each channel")
    pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
    pages = [page for k, page in enumerate(pages) if k == 0 or not page.is_reduced]
    for page in pages:
        sources.check_page(page)
        if page.samplesperpixel != 1 or sources.tiff_table(page)[1] == "colour":
            raise BadImage("has colour pages; expected one page of grey levels for each channel")
    if len({page.shape for page in pages}) > 1:
        raise BadImage(f"has pages of different sizes: {', '.join(str(page.shape) for page in pages[:5])}")
    return pages


def tiff_stack_header(tiff: tifffile.TiffFile) -> StackHeader:
    """Return what a TIFF says about itself, as OME-XML, as ImageJ's properties, or in tifffile's own words."""
    pages = stack_pages(tiff)
    n, first = planes_in(tiff, pages), pages[0]
    text = first.description[:MAX_METADATA]
    if text.lstrip()[:200].startswith("<") and "OME" in text[:2000]:
        found = ome_metadata(text)
        if len(found.order) != n and found.order:
            raise BadImage(f"says that it has {len(found.order)} planes, and has {n}")
        names, size = found.names, found.pixel_size
    elif first.is_imagej:
        names, size = imagej_metadata(tiff)
    else:
        names, size = shaped_names(text), None
    names = tuple(names) if len(names) == n else ("",) * n
    height, width = sources.oriented(np.empty(first.shape[:2], bool), first.tags.valueof("Orientation", 1)).shape
    return StackHeader(width, height, names, size)


def planes_in(tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> int:
    """Return how many planes a TIFF has: its pages, or images that follow each other under a single one."""
    if len(pages) > 1:
        return len(pages)
    n = min(sources.claimed_images(tiff), sources.room(tiff))
    if n > MAX_PLANES:
        raise BadImage(f"has {n} images; expected one for each channel")
    return max(1, n)


def tiff_stack_plane(tiff: tifffile.TiffFile, number: int) -> np.ndarray:
    """Decode the plane of a channel according to its page's tags."""
    pages = stack_pages(tiff)
    text = pages[0].description[:MAX_METADATA]
    if text.lstrip()[:200].startswith("<") and "OME" in text[:2000]:
        order = ome_metadata(text).order
        number = order[number] if order else number
    if number < len(pages):
        return sources.page_pixels(pages[number])
    page = pages[0]  # whose pixels the further planes follow
    if page.photometric != tifffile.PHOTOMETRIC.MINISBLACK or page.bitspersample not in (8, 16):
        raise BadImage("has several planes in one page of a kind that programs read differently; save it again")
    tiff.filehandle.seek(page.dataoffsets[0] + number * page.nbytes)
    kind = np.dtype(page.dtype).newbyteorder(tiff.byteorder)
    stored = np.frombuffer(tiff.filehandle.read(page.nbytes), kind).reshape(page.shape[:2]).astype(page.dtype)
    return sources.oriented(stored, page.tags.valueof("Orientation", 1))


@dataclass(frozen=True)
class OmeMetadata:
    """names : of the channels; order : the page of each channel, () if they follow each other."""

    names: tuple[str, ...]
    order: tuple[int, ...]
    pixel_size: float | None


def ome_metadata(text: str) -> OmeMetadata:
    """Read OME-XML (the schema of 2016-06 and its predecessors); raises BadImage unless it is one image of channels."""
    if "<!ENTITY" in text or "<!DOCTYPE" in text:
        raise BadImage("has OME-XML with entities; save it again")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise BadImage(f"has damaged OME-XML ({error}); save it again") from None
    every = [element for element in root.iter() if local(element) == "Pixels"]
    if len(every) != 1:
        raise BadImage(f"has {len(every)} images; expected one with a plane for each channel")
    pixels = every[0]
    depth, times = (pixels.get(f"Size{axis}", "1") for axis in "ZT")
    if (depth, times) != ("1", "1"):
        raise BadImage(f"has {depth} planes in depth and {times} in time; save one of them, or a projection")
    names = tuple(element.get("Name", "") for element in pixels if local(element) == "Channel")
    size = square_pixel(
        *(in_micrometres(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit", "µm")) for a in "XY")
    )
    return OmeMetadata(names, ome_order(pixels), size)


def local(element: ElementTree.Element) -> str:
    """Return an XML element's name without its namespace."""
    return element.tag.rpartition("}")[2]


def ome_order(pixels: ElementTree.Element) -> tuple[int, ...]:
    """Return the page of each channel as TiffData elements list them; () if there is none, or one for all."""
    blocks = [element for element in pixels if local(element) == "TiffData"]
    files = {uuid.get("FileName") for block in blocks for uuid in block if local(uuid) == "UUID"}
    if len(files) > 1:
        raise BadImage(f"has its planes in {len(files)} files; save them in one")
    pages: dict[int, int] = {}
    try:
        for block in blocks:
            first, page = int(block.get("FirstC", 0)), int(block.get("IFD", 0))
            for k in range(min(MAX_PLANES, int(block.get("PlaneCount", 1 if "IFD" in block.attrib else 0)))):
                pages[first + k] = page + k
    except ValueError:
        raise BadImage("has OME-XML whose planes are not numbers; save it again") from None
    if pages and (sorted(pages) != list(range(len(pages))) or sorted(pages.values()) != list(range(len(pages)))):
        raise BadImage("has OME-XML that does not say which page is which channel; save it again")
    return tuple(pages[c] for c in sorted(pages))


def imagej_metadata(tiff: tifffile.TiffFile) -> tuple[tuple[str, ...], float | None]:
    """Return the labels of an ImageJ file's planes, and a pixel's size; raises BadImage for depth or time."""
    found = tiff.imagej_metadata or {}
    if any(int(found.get(axis, 1)) > 1 and found.get("channels") for axis in ("slices", "frames")):
        raise BadImage(
            f"has {found.get('slices', 1)} slices and {found.get('frames', 1)} frames; save one of them, or a "
            "projection"
        )
    labels = found.get("Labels") or ()
    names = tuple(str(label) for label in labels) if isinstance(labels, (list, tuple)) else ()
    page = tiff.pages.first
    return names, square_pixel(*(resolution(page, f"{axis}Resolution", found.get("unit")) for axis in "XY"))


def resolution(page: tifffile.TiffPage, tag: str, unit: object) -> float | None:
    """Return the micrometres of a pixel from the pixels per unit that ImageJ writes."""
    value = page.tags.valueof(tag)
    try:
        pixels, units = value
        return in_micrometres(str(units / pixels), str(unit or ""))
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def shaped_names(text: str) -> tuple[str, ...]:
    """Return the channels that tifffile's own description names, as stage 01's stored images have it."""
    try:
        names = json.loads(text)["channels"]
        return tuple(map(str, names)) if isinstance(names, list) else ()
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


# --- OME-Zarr ----------------------------------------------------------------------------------------------


@contextmanager
def open_zarr(path: Path) -> Iterator[Any]:
    """Open a folder in OME-Zarr (0.4 or 0.5) for reading; raises UserError without the package zarr."""
    try:
        import zarr
    except ImportError:
        raise UserError(f"{path}: OME-Zarr needs the package zarr; run: pip install zarr") from None
    yield zarr.open_group(str(path), mode="r")


def zarr_levels(group: Any) -> tuple[dict, Any]:
    """Return an OME-Zarr's description of its image, and the array of its full size."""
    attributes = dict(group.attrs)
    attributes = {**attributes, **attributes.get("ome", {})}
    scales = attributes.get("multiscales")
    if not scales:
        wells = "plate" in attributes or "well" in attributes
        raise BadImage(
            "is a plate; give the folder of one field" if wells else "has no multiscales: not an OME-Zarr image"
        )
    if len(scales) > 1:
        raise BadImage(f"has {len(scales)} images; expected one")
    place = str(scales[0]["datasets"][0]["path"])
    if place.startswith("/") or ".." in place.split("/"):
        raise BadImage(f"has its pixels outside of its folder ({place})")
    return {**scales[0], "omero": attributes.get("omero", {})}, group[place]


def zarr_axes(image: dict, array: Any) -> list[str]:
    """Return the names of an array's axes; raises BadImage unless they are channels, rows and columns of one plane."""
    axes = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in image.get("axes", "tczyx")]
    if len(axes) != len(array.shape) or axes[-2:] != ["y", "x"] or not set(axes) <= set("tczyx"):
        raise BadImage(f"has the axes {', '.join(axes)} for {len(array.shape)} dimensions; expected t, c, z, y, x")
    deep = {axis: n for axis, n in zip(axes, array.shape, strict=True) if axis in "tz" and n != 1}
    if deep:
        raise BadImage(f"has {' and '.join(f'{n} planes along {axis}' for axis, n in deep.items())}; save one of them")
    return axes


def zarr_header(group: Any) -> StackHeader:
    """Return what an OME-Zarr says about itself."""
    image, array = zarr_levels(group)
    axes = zarr_axes(image, array)
    n = array.shape[axes.index("c")] if "c" in axes else 1
    if n > MAX_PLANES:
        raise BadImage(f"has {n} channels; at most {MAX_PLANES} are accepted")
    if array.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"holds {array.dtype}; expected unsigned integers of at most 16 bits")
    if math.prod(array.chunks) > sources.MAX_SIDE**2 * MAX_PLANES:
        raise BadImage(f"claims chunks of {' x '.join(map(str, array.chunks))}")
    labels = [str(channel.get("label", "")) for channel in image["omero"].get("channels", ())]
    names = tuple(labels) if len(labels) == n else ("",) * n
    height, width = array.shape[-2:]
    return StackHeader(width, height, names, zarr_pixel_size(image, axes))


def zarr_pixel_size(image: dict, axes: list[str]) -> float | None:
    """Return a pixel's size in micrometres from the scale of the largest array."""
    scale = [1.0] * len(axes)
    for part in (image["datasets"][0], image):
        for change in part.get("coordinateTransformations", ()):
            if change.get("type") == "scale" and len(change["scale"]) == len(axes):
                scale = [a * float(b) for a, b in zip(scale, change["scale"], strict=True)]
    units = [axis.get("unit") if isinstance(axis, dict) else None for axis in image.get("axes", ())]
    return square_pixel(*(in_micrometres(str(scale[k]), units[k] if units else None) for k in (-1, -2)))


def zarr_plane(group: Any, number: int) -> np.ndarray:
    """Decode the plane of a channel."""
    image, array = zarr_levels(group)
    axes = zarr_axes(image, array)
    return np.asarray(array[tuple(number if axis == "c" else 0 for axis in axes[:-2])])


STACK_READERS: dict[str, StackReader] = {
    "TIFF": StackReader(
        (".tif", ".tiff", ".ome.tif", ".ome.tiff"), tifffile.TiffFile, tiff_stack_header, tiff_stack_plane
    ),
    "OME-Zarr": StackReader((".ome.zarr", ".zarr"), open_zarr, zarr_header, zarr_plane),
}
