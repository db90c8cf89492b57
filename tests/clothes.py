"""The same fields of view in other clothes: every format of new images, from planes in the order of CHANNELS."""

from pathlib import Path

import numpy as np
import pandas as pd
import tifffile
from PIL import Image

from common.data.images import CHANNELS

ORDER = (2, 0, 3, 1)  # of the channels in files with several


def full_range(planes: np.ndarray) -> np.ndarray:
    """Return 8-bit planes as 16-bit ones that mean the same."""
    return planes.astype(np.uint16) * 257


def pngs(folder: Path, fields: dict[str, np.ndarray]) -> Path:
    for Id, planes in fields.items():
        for channel, plane in zip(CHANNELS, planes, strict=True):
            Image.fromarray(plane).save(folder / f"{Id}_{channel}.png")
    return folder


def tiffs(folder: Path, fields: dict[str, np.ndarray]) -> Path:
    for Id, planes in fields.items():
        for channel, plane in zip(CHANNELS, full_range(planes), strict=True):
            tifffile.imwrite(folder / f"{Id}_{channel}.tif", plane)
    return folder


def ome_tiffs(folder: Path, fields: dict[str, np.ndarray], pixel_size: float | None = None) -> Path:
    """16 bit, channels in another order, with their names."""
    size = {"PhysicalSizeX": pixel_size, "PhysicalSizeXUnit": "µm"} if pixel_size else {}
    size |= {"PhysicalSizeY": pixel_size, "PhysicalSizeYUnit": "µm"} if pixel_size else {}
    for Id, planes in fields.items():
        names = [CHANNELS[k] for k in ORDER]
        metadata = {"axes": "CYX", "Channel": {"Name": names}, **size}
        tifffile.imwrite(
            folder / f"{Id}.ome.tif", full_range(planes)[list(ORDER)], photometric="minisblack", metadata=metadata
        )
    return folder


def imagej_tiffs(folder: Path, fields: dict[str, np.ndarray], pixel_size: float | None = None) -> Path:
    """Composite images as Fiji saves them, big-endian, with labels."""
    size = {"unit": "um"} if pixel_size else {}
    options = {"resolution": (1 / pixel_size, 1 / pixel_size)} if pixel_size else {}
    for Id, planes in fields.items():
        labels = [CHANNELS[k] for k in ORDER]
        metadata = {"axes": "CYX", "mode": "composite", "Labels": labels, **size}
        tifffile.imwrite(folder / f"{Id}.tif", planes[list(ORDER)], imagej=True, metadata=metadata, **options)
    return folder


def pages(folder: Path, fields: dict[str, np.ndarray]) -> Path:
    """Plain pages without names: `--channels` says which is which."""
    for Id, planes in fields.items():
        with tifffile.TiffWriter(folder / f"{Id}.tiff") as file:
            for k in ORDER:
                file.write(planes[k], photometric="minisblack", metadata=None)
    return folder


def rgb_coded(folder: Path, fields: dict[str, np.ndarray]) -> Path:
    """Colour images as the atlas codes them, without loss."""
    for Id, planes in fields.items():
        for channel, plane in zip(CHANNELS, planes, strict=True):
            where = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}[channel]
            image = np.zeros((*plane.shape, 3), np.uint8)
            image[..., list(where)] = plane[..., None]
            Image.fromarray(image).save(folder / f"{Id}_{channel}.png")
    return folder


def csv_of_paths(folder: Path, fields: dict[str, np.ndarray]) -> Path:
    (folder / "files").mkdir()
    rows = []
    for number, (Id, planes) in enumerate(fields.items()):
        row = {"Id": Id}
        for channel, plane in zip(CHANNELS, planes, strict=True):
            Image.fromarray(plane).save(folder / "files" / f"{number}{channel[0]}.png")
            row[channel] = f"files/{number}{channel[0]}.png"
        rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)
    return folder / "images.csv"


def ome_zarrs(
    folder: Path, fields: dict[str, np.ndarray], pixel_size: float | None = None, version: str = "0.4"
) -> Path:
    """OME-Zarr 0.4 or 0.5 with named channels; needs zarr."""
    import zarr

    for Id, planes in fields.items():
        group = zarr.open_group(str(folder / f"{Id}.ome.zarr"), mode="w", zarr_format=2 if version == "0.4" else 3)
        group.create_array("0", data=planes[list(ORDER)][None, :, None], chunks=(1, 1, 1, 64, 64))
        scale = [1.0, 1.0, 1.0, *[pixel_size or 1.0] * 2]
        unit = {"unit": "micrometer"} if pixel_size else {}
        axes = [{"name": "t"}, {"name": "c"}, {"name": "z"}, {"name": "y", **unit}, {"name": "x", **unit}]
        transformations = [{"type": "scale", "scale": scale}]
        datasets = [{"path": "0", "coordinateTransformations": transformations}]
        found = {
            "multiscales": [{"version": version, "axes": axes, "datasets": datasets}],
            "omero": {"channels": [{"label": CHANNELS[k]} for k in ORDER]},
        }
        group.attrs.update(found if version == "0.4" else {"ome": {"version": version, **found}})
    return folder


CLOTHES = {
    "16-bit TIFFs": tiffs,
    "OME-TIFF": ome_tiffs,
    "ImageJ TIFF": imagej_tiffs,
    "pages": pages,
    "RGB-coded": rgb_coded,
    "CSV": csv_of_paths,
    "OME-Zarr": ome_zarrs,
}
