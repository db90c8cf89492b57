"""Read .npy and .npz files of any origin: without pickle, and with bounded memory."""

import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np

from common.errors import first_line

MAX_BYTES = 2**28  # of a file's arrays: fifty times the competition's test set


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz by name, or the one of an .npy under the name ''.

    names : of the arrays to read; None for all

    Raises OSError if there is no file, ValueError if it is damaged, holds objects, or claims more than MAX_BYTES.
    """
    with open(path, "rb") as file:
        return arrays_in(file, os.path.getsize(path), names)


def arrays_in(file: IO[bytes], size: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an open file of `size` bytes; see `read_arrays`."""
    try:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {"": read_array(file, size)}
        with zipfile.ZipFile(file) as members:
            check_size(inflated_size(members))
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members.infolist()):
                # zipfile would decompress these without a limit.
                raise ValueError("is compressed with a method other than deflate")
            return {
                info.filename.removesuffix(".npy"): read_array(members.open(info), info.file_size)
                for info in members.infolist()
                if names is None or info.filename.removesuffix(".npy") in names
            }
    except Exception as error:  # damaged files raise many types
        raise ValueError(first_line(error)) from None


def read_array(file: IO[bytes], size: int) -> np.ndarray:
    """Read one array from an open .npy of `size` bytes; its header must not claim more."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in "biufSU":
        raise ValueError(f"holds {dtype}; expected numbers or text")
    n_bytes = math.prod(shape) * dtype.itemsize
    if not 0 <= n_bytes <= size:
        raise ValueError(f"its header claims an array of shape {shape} of {dtype}; the file has {size} bytes")
    check_size(n_bytes)
    return np.frombuffer(file.read(n_bytes), dtype).reshape(shape, order="F" if fortran_order else "C")


def check_size(n_bytes: int) -> None:
    if n_bytes > MAX_BYTES:
        raise ValueError(f"claims {n_bytes / 1e9:.1f} GB of arrays; at most {MAX_BYTES / 1e9:.1f} GB are accepted")


def inflated_size(members: zipfile.ZipFile) -> int:
    """Return how many bytes an archive claims to hold; reading it yields no more."""
    return sum(info.file_size for info in members.infolist())


def refuse_damaged(path: Path) -> None:
    """Raise ValueError for an archive with a part that does not match its checksum."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            if damaged := members.testzip():
                raise ValueError(f"its part {damaged} is damaged")


def refuse_inflated(path: Path) -> None:
    """Raise ValueError for an archive that claims more than its own size: torch does not compress, a zip bomb does."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            if inflated_size(members) > os.path.getsize(path):
                raise ValueError(f"claims {inflated_size(members):,} bytes in {os.path.getsize(path):,}")
