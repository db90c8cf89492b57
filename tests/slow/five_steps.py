"""Five steps of GapNet-PL (it has no BatchNorm, whose statistics are each process's own) on one or several processes.

Started by test_distributed.py, alone or through torchrun, on the CPU or on GPUs; saves weights, losses and the hard sampler's choices.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.recipes import GAPNET_PL
from common.train.dataset import ImageSet, Normalisation
from common.train.fold_data import FoldData
from common.train.hardware import HardwareOptions, choose_hardware
from common.train.run import new_run
from common.train.step import train_step

BATCH = 11  # odd, so that two processes have parts of different size


def main(path: str, micro_batch: str, device: str) -> None:
    hardware = choose_hardware(HardwareOptions(device, "fp32", 0, int(micro_batch) or None))
    team = hardware.team
    recipe = replace(GAPNET_PL, size_divisor=8, dropouts=(0.0, 0.0), hard_share=0.6, batch_size=BATCH)
    empty = ImageSet(Path(), np.array([str(i) for i in range(BATCH)]), np.zeros((BATCH, 28), dtype=bool))
    data = FoldData(empty, empty, np.arange(28) + 1, Normalisation((0.5,) * 4, (0.3,) * 4))
    run = new_run(recipe, data, hardware, 0, 0)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.01
    random = torch.Generator().manual_seed(0)
    steps = []
    for step in range(5):
        images = torch.randint(0, 256, (BATCH, 4, 48, 48), dtype=torch.uint8, generator=random)
        targets = (torch.rand(BATCH, 28, generator=random) < 0.1).float()
        part = team.part(BATCH)
        losses, kept = train_step(run, images[part], targets[part], BATCH, recipe.hard_share, step)
        steps.append({"losses": losses, "kept": kept})
    torch.save({"model": run.model.state_dict(), "steps": steps}, f"{path}.{team.rank}")
    team.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
