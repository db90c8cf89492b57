"""Small inputs for the tests on a GPU."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from common.train.dataset import ImageSet, Normalisation
from common.train.fold_data import FoldData
from tests.conftest import ROOT
from tests.slow.test_training import SMALL

FEW_EPOCHS = ("cycle_epochs=2", "max_cycles=1", "evaluate_epochs=1")
OURS = replace(SMALL, learning_rates=(1e-3, 1e-3), weight_decay=0.05)
RECIPES = {"sgd": SMALL, "adamw": replace(OURS, optimizer="adamw"), "muon": replace(OURS, optimizer="muon")}


def drawn(n: int, size: int) -> FoldData:
    """Return n images of noise, one class each, that lie in memory; the same ones for training and validation."""
    rng = np.random.default_rng(0)
    targets = np.arange(28) == np.arange(n)[:, None] % 28
    images = ImageSet(ROOT, np.array([f"s{i}" for i in range(n)]), targets, size)
    for Id in images.ids:
        images.cache.keep(Id, rng.integers(0, 256, (size, size, 4), dtype=np.uint8).transpose(2, 0, 1))
    return FoldData(images, replace(images, crop=None), targets.sum(axis=0), Normalisation((0.5,) * 4, (0.3,) * 4))


def noise(n: int, size: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch: images (n, 4, size, size) uint8, channels last in memory, and targets (n, 28)."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, size, size, 4), dtype=torch.uint8, generator=random)
    return images.permute(0, 3, 1, 2).to(device), (torch.rand(n, 28, generator=random) < 0.1).float().to(device)


def with_rates(run):
    """Return a run whose layer groups have their top learning rates."""
    for group in run.optimizer.param_groups:
        group["lr"] = group["top_lr"]
    return run


@contextmanager
def little_memory(work):
    """Do `work()`, then allow a quarter of the GPU memory that it took: with half of it, less room for kernels might do."""

    def settle():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    settle()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    work()
    taken = torch.cuda.max_memory_allocated() - before
    settle()
    assert taken > 2**28, "a limit is only exact to a few of the allocator's blocks"
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((before + taken / 4) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
