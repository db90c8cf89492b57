"""Batches of windows of new images: read, scaled, cut and stacked, while the networks are busy with earlier ones."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from common.data.options import Levels
from common.data.sources import CHANNELS, BadImage
from common.predict.inputs import NewImage, read_image
from common.predict.model import SIDE, Member, Model
from common.predict.windows import count_windows, cover, scaled_planes, scaled_shape
from common.recipes import stored_size
from common.train.dataset import collate, loader, standardise
from common.train.hardware import Hardware

T = TypeVar("T")


class Kind(NamedTuple):
    """What members must share to be given the same windows."""

    store: str
    standardised: bool


def kind_of(member: Member) -> Kind:
    return Kind(member.recipe.store, member.recipe.standardised)


@dataclass
class Item:
    """One image's windows for each kind of member, each (4, side, side) uint8, channels last in memory.

    means : (4,) of its channels, 0 to 1, NaN where missing
    exposed : see `inputs.read_image`; fault : why it cannot be used
    """

    row: int
    windows: dict[Kind, list[np.ndarray]] = field(default_factory=dict)
    means: np.ndarray = field(default_factory=lambda: np.zeros(len(CHANNELS)))
    exposed: dict = field(default_factory=dict)
    fault: str = ""


@dataclass
class Windows:
    """Windows of one size: images (m, 4, side, side) uint8, and the place in the batch of each one's image, (m,)."""

    images: torch.Tensor
    owners: np.ndarray

    def pin_memory(self) -> "Windows":
        return Windows(self.images.pin_memory(), self.owners)


@dataclass
class FieldBatch:
    """A batch of images: those that could be read, with their windows for each kind of member; and the others."""

    items: list[Item]
    windows: dict[Kind, list[Windows]]
    faulty: list[Item]

    def pin_memory(self) -> "FieldBatch":
        pinned = {kind: [some.pin_memory() for some in groups] for kind, groups in self.windows.items()}
        return FieldBatch(self.items, pinned, self.faulty)


@dataclass
class NewImages(Dataset):
    """Images to predict; an item is the `Item` of a row."""

    images: list[NewImage]
    kinds: tuple[Kind, ...]
    pixel_size: float
    levels: Levels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Item:
        image = self.images[row]
        try:
            planes, exposed = read_image(image)
            item = Item(row, exposed=exposed)
            for store in dict.fromkeys(kind.store for kind in self.kinds):
                side, shape = size_for(image, store, self.pixel_size)
                scaled = scaled_planes(planes, shape, self.levels)
                item.means = scaled.mean(axis=(1, 2)) / 255
                item.means[[CHANNELS.index(channel) for channel in image.missing]] = np.nan
                for kind in self.kinds:
                    if kind.store == store:
                        item.windows[kind] = [prepared(window, kind) for window in cover(scaled, side)]
        except BadImage as error:
            return Item(row, fault=str(error))
        return item


def size_for(image: NewImage, store: str, pixel_size: float) -> tuple[int, tuple[int, int]]:
    """Return the side of windows for networks that read a store, and the (height, width) of the scaled field.

    pixel_size : see `Model.pixel_size`
    """
    whole = min(image.height, image.width) if image.pixel_size is None else SIDE
    side = stored_size(store, whole)
    return side, scaled_shape(image, side, pixel_size * SIDE / side)


def prepared(window: np.ndarray, kind: Kind) -> np.ndarray:
    """Return a window as networks of a kind are given it, channels last in memory."""
    planes = standardise(np.ascontiguousarray(window)) if kind.standardised else window
    return cv2.merge(list(planes)).transpose(2, 0, 1)


def stack_items(items: Sequence[Item], pinned: bool = False) -> FieldBatch:
    """Stack the windows of a batch's images, those of one size together."""
    good = [item for item in items if not item.fault]
    windows: dict[Kind, list[Windows]] = {}
    for kind in good[0].windows if good else ():
        sizes: dict[tuple[int, ...], list[tuple[np.ndarray, int]]] = {}
        for place, item in enumerate(good):
            for window in item.windows[kind]:
                sizes.setdefault(window.shape, []).append((window, place))
        windows[kind] = [
            Windows(
                collate([(window, np.zeros(0)) for window, _ in some], pinned)[0],
                np.array([place for _, place in some]),
            )
            for some in sizes.values()
        ]
    for item in good:
        item.windows = {}  # they are in the batch now
    return FieldBatch(good, windows, [item for item in items if item.fault])


def plan_batches(images: Sequence[NewImage], model: Model, batch_size: int) -> list[list[int]]:
    """Return the rows of each batch, in order: as many images as have `batch_size` windows together, at least one."""
    stores = {member.recipe.store for member in model.members}
    batches: list[list[int]] = []
    room = 0
    for row, image in enumerate(images):
        sizes = [size_for(image, store, model.pixel_size) for store in stores]
        n = max(count_windows(shape, side) for side, shape in sizes)
        if not batches or n > room:
            batches.append([])
            room = batch_size
        batches[-1].append(row)
        room -= n
    return batches


def load_batches(dataset: NewImages, batches: list[list[int]], hardware: Hardware) -> Iterator[FieldBatch]:
    """Yield the batches in order, loaded by other processes, or else by a thread that is one batch ahead."""
    loading = loader(dataset, hardware.workers, hardware.is_gpu, batches, stack_items)
    yield from loading if hardware.workers else ahead(loading)


def ahead(iterable: Iterable[T]) -> Iterator[T]:
    """Yield from an iterable that a thread reads, one item ahead; its exceptions are raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(1)
    over = threading.Event()

    def put(kind: str, value: Any = None) -> None:
        while not over.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in iterable:
                put("item", item)
                if over.is_set():
                    return
        except BaseException as error:  # raised again where it is waited for
            put("error", error)
        put("end")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        over.set()
        thread.join()


Fill = Callable[[torch.Tensor, int, int], None]


def copy_of(channel: str) -> Fill:
    """Return a filling: a copy of another channel."""
    source = CHANNELS.index(channel)

    def fill(images: torch.Tensor, place: int, mean: int) -> None:
        images[:, place] = images[:, source]

    return fill


def constant(value: int | None) -> Fill:
    """Return a filling: a grey level everywhere; None for the mean of the training images."""

    def fill(images: torch.Tensor, place: int, mean: int) -> None:
        images[:, place] = mean if value is None else value

    return fill


# Functions that write into channel `place` of images (n, 4, h, w) uint8; mean : grey level of the training images.
FILLINGS: dict[str, Fill] = {
    "zeros": constant(0),
    "mean": constant(None),
    **{f"copy of {channel}": copy_of(channel) for channel in CHANNELS},
}


def fill_missing(images: torch.Tensor, missing: Sequence[str], how: Mapping[str, str], means: Sequence[int]) -> None:
    """Fill the missing channels of images (n, 4, h, w) uint8, with the mean where the channel to copy is missing too.

    how : channel -> row of FILLINGS; means : grey levels of the training images, of each channel
    """
    for channel in missing:
        name, place = how[channel], CHANNELS.index(channel)
        name = "mean" if name.removeprefix("copy of ") in missing else name
        FILLINGS[name](images, place, means[place])
