"""Probabilities from a network: devices, normalisation, and test-time views."""

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from common import stopping
from common.classes import N_CLASSES
from common.data import ImageSet, dihedral, loader, whole_batches
from common.distributed import Team, join_team, local_rank
from common.errors import UserError
from common.progress import progress

BATCH = 32  # whole images at once
MALLOPT = {-3: 2 ** 26, -1: 2 ** 28}  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in bytes, see `keep_freed_memory`
MEMORY_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Hardware:
    """Where and how a network runs: device, autocast type (None = 32-bit floats), loader processes, the team of
    processes that train together, how many images of a batch are in memory at once (None = all), and for training
    whether the network is compiled and how its tensors lie in memory."""
    device: torch.device
    autocast: torch.dtype | None = None
    workers: int = 0
    team: Team = Team()
    micro_batch: int | None = None
    compiled: bool = False
    memory_format: torch.memory_format = torch.channels_last

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def casting(self):
        return torch.autocast(self.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None)


def choose_hardware(device: str, precision: str, workers: int | None, micro_batch: int | None = None,
                    compiled: bool = False, memory_format: str = "channels-last", training: bool = True) -> Hardware:
    """Resolve 'auto': a GPU where there is one, else the CPU; bfloat16 where the hardware gains from it, float16 on
    older GPUs, else 32 bit. A CPU predicts in 32 bit always, so that no image's result depends on its batch.

    On the CPU the batches are made in the training process by default: the cores are the network's. Of several
    processes that torchrun started on one machine each gets its own GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank() is not None:
        device = f"cuda:{local_rank()}"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA GPU")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
    device = torch.device(device)
    keep_freed_memory()
    if precision == "auto" and device.type == "cpu":
        precision = "bf16" if training and bf16_is_faster(torch.cpu.get_capabilities()) else "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count())
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return Hardware(device, autocast, workers, join_team(device), micro_batch, compiled, MEMORY_FORMATS[memory_format])


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MB of what is freed for the next batch: given back to the system after every step, it would be asked
    for and zeroed again page by page, which takes up to a tenth of a small network's step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def bf16_is_faster(cpu: dict) -> bool:
    """Tell whether a CPU multiplies bfloat16 faster than 32-bit floats: Intel's with AMX only, others' with AVX-512 too."""
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16") and not cpu.get("cpu_name", "").startswith("Intel"))


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

    @cache
    def factors(self, device: torch.device, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shift and scale of 8-bit values for a row of pixels, (4 width,) each, on the device."""
        mean, std = (torch.tensor(values, device=device).repeat(width) for values in (self.mean, self.std))
        return -mean / std, 1 / (255 * std)


def views(tta: str, crop: int | None = None) -> list:
    """Return functions from images to the images that are predicted and averaged.

    tta : none, or dihedral for all 8 symmetries
    crop : side in pixels of five windows (corners and centre) to use in place of the whole image
    """
    def window(images, top, left):
        rows, columns = round(top * (images.shape[-2] - crop)), round(left * (images.shape[-1] - crop))
        return images[..., rows:rows + crop, columns:columns + crop]

    corners = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)] if crop else [None]
    turns = range(8) if tta == "dihedral" else range(1)
    return [lambda images, corner=corner, turn=turn: dihedral(window(images, *corner) if corner else images, turn)
            for corner in corners for turn in turns]


@torch.inference_mode()
def predict_logits(model, normalise: Normalisation, dataset: ImageSet, hardware: Hardware, looks: list,
                   batch_size: int = BATCH, label: str | None = None) -> torch.Tensor:
    """Return the logits of every image under every view, (n_views, n, n_classes) float32 on the CPU.

    Images are decoded once for all views. label : shown with a progress bar
    """
    model.eval()
    parts = whole_batches(dataset, batch_size)
    batches = loader(dataset, hardware.workers, hardware.is_gpu, parts)
    result = torch.empty(len(looks), len(dataset), N_CLASSES, device=hardware.device)
    for rows, (images, _) in zip(parts, progress(batches, len(parts), label or "", unit="batches", quiet=not label), strict=True):
        stopping.check()
        images = normalise(images, hardware.device)
        result[:, rows] = torch.stack([logits_in_parts(model, look(images), hardware) for look in looks])
    return result.cpu()


def logits_in_parts(model, images: torch.Tensor, hardware: Hardware) -> torch.Tensor:
    """Return the logits of a batch, (n, n_classes) float32, in as few parts as fit into memory."""
    size = len(images)
    while True:
        try:
            with hardware.casting():
                return torch.cat([model(part).float() for part in images.split(size)])
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise UserError("one image does not fit into the GPU's memory; try --device cpu") from None
        size = size // 2
        torch.cuda.empty_cache()


def mean_probabilities(logits: torch.Tensor) -> np.ndarray:
    """Return the mean probability over views, (n, n_classes) float32, of logits (n_views, n, n_classes)."""
    return logits.sigmoid().mean(dim=0).numpy()
