"""Probabilities from a network, by test-time views."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from common.classes import N_CLASSES
from common.errors import UserError, is_out_of_memory
from common.process import stopping
from common.process.progress import progress
from common.train.dataset import BATCH, Batch, ImageSet, Normalisation, dihedral, loader, on_device, whole_batches
from common.train.hardware import Hardware

View = Callable[[torch.Tensor], torch.Tensor]  # from images to what is predicted of them


def views(tta: str, crop: int | None = None) -> list[View]:
    """Return functions from images to the images that are predicted and averaged.

    tta : none, or dihedral for all 8 symmetries
    crop : side in pixels of five windows (corners and centre) to use in place of the whole image
    """

    def window(images: torch.Tensor, side: int, top: float, left: float) -> torch.Tensor:
        rows, columns = round(top * (images.shape[-2] - side)), round(left * (images.shape[-1] - side))
        return images[..., rows : rows + side, columns : columns + side]

    def view(images: torch.Tensor, where: tuple[int, float, float] | None, turn: int) -> torch.Tensor:
        return dihedral(window(images, *where) if where else images, turn)

    windows: list[tuple[int, float, float] | None] = [None]
    if crop:
        windows = [(crop, *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
    turns = range(8) if tta == "dihedral" else range(1)
    return [partial(view, where=where, turn=turn) for where in windows for turn in turns]


@dataclass
class Fitting:
    """How many images a GPU predicted at once when its memory was full; None before that."""

    size: int | None = None


def predict_logits(
    model: torch.nn.Module,
    normalise: Normalisation,
    dataset: ImageSet,
    hardware: Hardware,
    looks: Sequence[View],
    batch_size: int = BATCH,
    label: str | None = None,
    feed: Iterator[Batch] | None = None,
    fitting: Fitting | None = None,
) -> torch.Tensor:
    """Return the logits of every image under every view, (n_views, n, n_classes) float32 on the CPU.

    Images are decoded once for all views.
    label : shown with a progress bar
    feed : iterator that has the batches of `whole_batches` next, on the device; None to load them
    fitting : what is known of the memory; prediction continues with the size that fitted
    """
    model.eval()
    fitting = fitting or Fitting()
    parts = whole_batches(dataset, batch_size)
    batches = (
        islice(feed, len(parts))
        if feed
        else on_device(loader(dataset, hardware.workers, hardware.is_gpu, parts), hardware.device)
    )

    @torch.inference_mode()  # not around the loader, which may receive a later training batch meanwhile
    def logits_of(images: torch.Tensor) -> torch.Tensor:
        images = normalise(images, hardware.device)
        with hardware.casting():
            logits = torch.stack([model(look(images)).float() for look in looks])
        if hardware.autocast == torch.float16 and not logits.isfinite().all():  # an overflow, which 32 bits do not have
            logits = torch.stack([model(look(images)) for look in looks])
        return logits

    logits = [torch.empty(len(looks), 0, N_CLASSES, device=hardware.device)]
    for images, _ in progress(batches, len(parts), label or "", unit="batches", quiet=not label):
        stopping.check()
        logits.append(in_parts_that_fit(logits_of, images, fitting))
    result = torch.empty(len(looks), len(dataset), N_CLASSES)
    result[:, np.concatenate([*parts, np.zeros(0, dtype=int)])] = torch.cat(logits, dim=1).cpu()
    return result


def in_parts_that_fit(
    logits_of: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, fitting: Fitting
) -> torch.Tensor:
    """Return the logits of a batch, (n_views, n, n_classes), in as few parts as fit into memory."""
    while True:
        size = min(len(images), fitting.size or len(images))
        try:
            return torch.cat([logits_of(part) for part in images.split(size)], dim=1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if size == 1:
            raise UserError("one image does not fit into the GPU's memory; try --device cpu")
        fitting.size = size // 2
        torch.cuda.empty_cache()


def mean_probabilities(logits: torch.Tensor) -> np.ndarray:
    """Return the mean probability over views, (n, n_classes) float32, of logits (n_views, n, n_classes)."""
    return logits.sigmoid().mean(dim=0).numpy()
