"""From stored images to batches: random, augmented crops for training, whole images for evaluation.

Every random number is a function of (seed, epoch, position in the epoch), so workers never repeat each other
and a resumed run draws what an uninterrupted one would have drawn.
"""

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.data.images import corner, read_planes
from common.errors import UserError
from common.process import stopping
from common.recipes import row_of
from common.train.distributed import ALONE, Team

BATCH = 32  # whole images at once
CACHE_BYTES = 2**29  # of decoded images that a set keeps
# By the server that starts loader processes, so that these share the memory.
PRELOADED = ["torch", "pandas", "cv2", "tifffile"]
AHEAD = 3  # steps that may be queued on a GPU at once
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Image = TypeVar("Image", np.ndarray, torch.Tensor)
Batch = tuple[torch.Tensor, torch.Tensor]  # images (n, 4, h, w) uint8 and targets (n, n_classes) float32
STANDARD_MEAN, STANDARD_DEVIATION = 64, 24  # of each channel of a standardised image, in grey levels


def dihedral(image: Image, which: int) -> Image:
    """Apply one of the 8 symmetries of the square to (..., h, w): bit 1 of `which` transposes, 2 and 4 mirror.

    Works on NumPy arrays and on torch tensors.
    """
    if which & 1:
        image = image.swapaxes(-2, -1)
    mirrored = tuple(axis for bit, axis in ((2, -2), (4, -1)) if which & bit)
    if not mirrored:
        return image
    return image.flip(mirrored) if torch.is_tensor(image) else np.flip(image, mirrored)


def random_crop(image: np.ndarray, crop: int, draw: np.ndarray) -> np.ndarray:
    """Cut a random (crop, crop) window out of (4, h, w), placed by a sample's draw; returns a view, without a copy."""
    top, left = (corner(share, crop, side) for share, side in zip(draw, image.shape[1:], strict=False))
    return image[:, top : top + crop, left : left + crop]


# --- augmentations -----------------------------------------------------------------------------------------


class Chance:
    """The random numbers of one training sample: a function of (seed, epoch, position) in any process.

    draw : (3,) in [0, 1): two for the crop's place, one for its symmetry
    """

    def __init__(self, draw: np.ndarray) -> None:
        self.draw = draw

    @cached_property
    def generator(self) -> np.random.Generator:
        """A source of further random numbers."""
        return np.random.default_rng(np.asarray(self.draw, dtype=np.float64).view(np.uint64))


# Functions of (crop, chance) that return the changed crop, of the same shape, (4, crop, crop) uint8. They do not
# change the crop itself, which is kept for later epochs.
AUGMENTATIONS: dict[str, Callable[[np.ndarray, Chance], np.ndarray]] = {
    "dihedral": lambda image, chance: dihedral(image, int(8 * chance.draw[2]))
}


def augmented(image: np.ndarray, names: tuple[str, ...], draw: np.ndarray) -> np.ndarray:
    """Apply augmentations to a crop, (4, crop, crop) uint8; raises UserError if one returns another shape or type."""
    chance, shape = Chance(draw), image.shape
    for name in names:
        image = row_of(AUGMENTATIONS, "augmentations", name)(image, chance)
        if image.shape != shape or image.dtype != np.uint8:
            raise UserError(f"augmentation {name} returns {image.dtype} {image.shape}, expected uint8 {shape}")
    if image.strides[0] == 1:
        return image
    return np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1)  # channels last, as batches are


def standardise(planes: np.ndarray) -> np.ndarray:
    """Bring each channel of an image, (4, h, w) uint8, to the standard mean and deviation by its own.

    This hides exposure and the amount of a protein. Values 8 deviations above the mean or 2.7 below it are clipped.
    Noise in an empty channel stays small.
    """
    result = np.empty_like(planes)
    for plane, target in zip(planes, result, strict=True):
        mean, deviation = (value.item() for value in cv2.meanStdDev(plane))
        levels = STANDARD_MEAN + STANDARD_DEVIATION * (np.arange(256) - mean) / (deviation + 1)
        np.take(levels.round().clip(0, 255).astype(np.uint8), plane, out=target)
    return result


class Cache(dict):
    """Decoded images by Id, as many as fit into `room` bytes: small images are decoded once, large ones each time.

    A copy in another process has no room: else each loader process would keep all images.
    """

    def __init__(self, room: int = CACHE_BYTES) -> None:
        super().__init__()
        self.room = room

    def __reduce__(self) -> tuple[type["Cache"], tuple[int]]:
        return Cache, (0,)

    def keep(self, Id: str, image: np.ndarray) -> None:
        if image.nbytes > self.room:
            self.room = 0  # full: from now on only windows of large images are read
            return
        self[Id] = image
        self.room -= image.nbytes


@dataclass
class ImageSet(Dataset):
    """Images of `ids` under `folder` with their targets.

    One item is a (4, h, w) uint8 array, channels last in memory, and its targets.

    crop : side of random training crops in pixels; None for whole images
    sides : side of each stored image in pixels, if they may differ: one batch of whole images has one size
    crcs : checksum of each Id's pixels, if known
    standardised : see `standardise`
    augmentations : of training crops; see AUGMENTATIONS

    The key of a training item is its row and its draw (see `Chance`); that of a whole image is its row.
    """

    folder: Path
    ids: np.ndarray
    targets: np.ndarray
    crop: int | None = None
    sides: np.ndarray | None = None
    crcs: dict[str, str] = field(default_factory=dict, repr=False)
    standardised: bool = False
    augmentations: tuple[str, ...] = ("dihedral",)
    cache: Cache = field(default_factory=Cache, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        draw: Any  # None for whole images only
        row, draw = key if isinstance(key, tuple) else (key, None)
        Id = self.ids[row]
        image = self.cache.get(Id)
        if image is None:
            in_part = self.crop is not None and not self.cache.room
            image = self.read(Id, (self.crop, *draw[:2]) if in_part else None)
            self.cache.keep(Id, image)
        if self.crop is not None:
            image = augmented(random_crop(image, self.crop, draw), self.augmentations, draw)
        return image, self.targets[row]

    def read(self, Id: str, window: tuple | None = None) -> np.ndarray:
        """Decode one stored image, or a `window` of it (see `read_planes`). Raises UserError if missing or damaged."""
        path, crc = self.folder / f"{Id}.tif", self.crcs.get(Id)
        if self.standardised:  # by the statistics of the whole image
            planes = standardise(read_planes(path, crc, lent=True))
        else:
            planes = read_planes(path, crc, window, lent=True)
        return cv2.merge(list(planes)).transpose(2, 0, 1)  # channels last in memory, as batches are


@dataclass
class Sets(Dataset):
    """Several sets that one loader serves; a key is the number of the set and a key of that set."""

    sets: tuple[ImageSet, ...]

    def __getitem__(self, key: tuple[int, int | tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        number, own = key
        return self.sets[number][own]


def whole_batches(dataset: ImageSet, batch_size: int) -> list[np.ndarray]:
    """Return the rows of each batch of whole images: all rows, grouped by image size, in order."""
    sides = np.zeros(len(dataset)) if dataset.sides is None else dataset.sides
    rows = [np.flatnonzero(sides == side) for side in np.unique(sides)]
    return [part for same in rows for part in np.split(same, range(batch_size, len(same), batch_size))]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel on the 0-1 scale, (4,) each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Turn (n, 4, h, w) uint8 images into normalised floats on the device, channels last."""
        images = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (n, h, 4w), in the same memory: long rows are ten times as fast
        shift, scale = self.factors(device, images.shape[3])
        torch.addcmul(shift, rows, scale, out=rows)
        return rows.unflatten(2, (-1, 4)).permute(0, 3, 1, 2)

    @cache  # noqa: B019 - one normalisation lives as long as its network
    def factors(self, device: torch.device, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shift and scale of 8-bit values for a row of pixels, (4 width,) each, on the device."""
        mean, std = (torch.tensor(values, device=device).repeat(width) for values in (self.mean, self.std))
        return -mean / std, 1 / (255 * std)


class EpochBatches:
    """Batches of (row, draw for its crop) for one epoch: all rows in an order drawn from (seed, epoch).

    Every batch is full, so that normalisation layers and the hard sampler see the same batch size. The incomplete last
    batch is dropped; its rows differ from epoch to epoch. With fewer rows than a batch, one batch holds all.

    start : number of batches to skip because an interrupted run had them
    team : of several processes each one gets its part of every batch
    weights : (n_rows,) how often rows are drawn, relative to each other; each row is drawn that often, rounded up or
        down
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int,
        epoch: int,
        start: int = 0,
        team: Team = ALONE,
        weights: np.ndarray | None = None,
    ) -> None:
        self.batch = min(batch_size, n_rows)
        self.steps = n_rows // self.batch
        rng = np.random.default_rng([seed, epoch])
        self.order, self.draws = rng.permutation(n_rows), rng.random((n_rows, 3))
        if weights is not None:
            ends = np.cumsum(weights)
            self.order = np.searchsorted(ends, (self.order + rng.random()) / n_rows * ends[-1]).clip(0, n_rows - 1)
        self.start, self.team = start, team
        if self.batch < team.size:
            raise UserError(f"a batch of {self.batch} samples cannot be shared by {team.size} processes; start fewer")

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of a whole batch, (batch,)."""
        return self.order[step * self.batch : (step + 1) * self.batch]

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray]]]:
        for step in range(self.start, self.steps):
            positions = range(step * self.batch, (step + 1) * self.batch)[self.team.part(self.batch)]
            yield [(int(self.order[p]), self.draws[p]) for p in positions]


def collate(items: Sequence[tuple[np.ndarray, np.ndarray]], pinned: bool = False) -> Batch:
    """Stack items to (n, 4, h, w) uint8 images, channels last in memory, and (n, n_classes) float targets.

    A loader process stacks them in memory shared with the process that it loads for; others use pinned memory if
    `pinned`. So a batch is written once.
    """
    images, targets = zip(*items, strict=True)
    height, width = images[0].shape[1:]
    shape = len(images), height, width, len(images[0])
    pixels, labels = (
        new_tensor(shape, torch.uint8, pinned),
        new_tensor((len(targets), len(targets[0])), torch.float32, pinned),
    )
    # The four bytes of a pixel are copied as one number, which is five times as fast.
    np.stack([image.transpose(1, 2, 0).view(np.uint32) for image in images], out=pixels.numpy().view(np.uint32))
    np.stack(targets, out=labels.numpy(), casting="unsafe")
    return pixels.permute(0, 3, 1, 2), labels


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """Return an empty tensor: in shared memory in a loader process, elsewhere in pinned memory if `pinned`.

    So if shared memory is full, this call fails, instead of a thread that sends batches hanging.
    """
    if get_worker_info():
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
        # The stubs ask for strides.
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    return torch.empty(shape, dtype=dtype, pin_memory=pinned)


class Loader(DataLoader):
    """A DataLoader whose processes come from a server of single-threaded ones: forking threads may deadlock.

    They get no signals before `begin_loading`: else torch would let SIGTERM end them, and training with them, and
    Ctrl+C would make them print a traceback.
    """

    def __iter__(self) -> Any:
        set_forkserver_preload(PRELOADED)
        with stopping.blocked(stopping.SIGNALS), one_thread():
            return super().__iter__()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let processes that are started inside use one thread each: loading already keeps all cores busy."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def loader(
    dataset: Dataset, workers: int, pinned: bool, batches: Iterable[Any], collate: Callable[..., Any] = collate
) -> Iterable[Any]:
    """Return an iterable of the given batches, lists of the dataset's keys, in their order.

    workers : processes that load them; small batches need none, since a DataLoader's own work takes as long
    pinned : whether batches are in memory that a GPU copies from by itself
    collate : function of a batch's items, and pinned -> the batch
    """
    if not workers:
        return (collate([dataset[key] for key in keys], pinned) for keys in batches)
    return Loader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pinned,
        batch_sampler=batches,
        multiprocessing_context=get_context("forkserver"),
        worker_init_fn=begin_loading,
    )


def begin_loading(_: int) -> None:
    """Let a loader process ignore signals to the whole process group: the process that it loads for ends it in time."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stopping.end_later())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    cv2.setNumThreads(1)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches (images, targets) on the device. On a GPU a batch is copied while the previous step runs."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    steps: deque[torch.cuda.Event] = deque()
    for images, targets in batches:  # requested while the previous step runs
        with torch.cuda.stream(copying):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for part in (images, targets):
            part.record_stream(computing)  # its memory is not reused before the step is over
        yield images, targets
        steps.append(computing.record_event())
        if len(steps) > AHEAD:  # each waiting batch holds memory
            steps.popleft().synchronize()
