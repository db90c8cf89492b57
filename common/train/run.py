"""The state of a run: what a training works with, and which parts of it a checkpoint holds, declared once.

To add a piece of state, add one field to `Run`, with `saved` if a resumed training needs it.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from common.classes import CLASS_NAMES, N_CLASSES
from common.data.class_weights import draw_weights, effective_number_weights
from common.errors import UserError
from common.recipes import Recipe, to_dict
from common.train.dataset import EpochBatches, Normalisation
from common.train.fold_data import FoldData
from common.train.hardware import Fitting, Hardware, set_kernels
from common.train.networks import build_model, synchronised
from common.train.optimizers import Average, build_optimizer, freeze, param_groups

FORMAT = 4  # of checkpoints; add one whenever older ones could be misread, as after each change of a network
ENOUGH_IMAGES = 8  # for BatchNorm, in each of several processes

Kind = type | tuple[type, ...]
NUMBER = (int, float)


# --- how a piece of state is restored from a checkpoint ----------------------------------------------------


def put(run: "Run", name: str, value: Any) -> None:
    setattr(run, name, value)


def load(run: "Run", name: str, value: dict) -> None:
    getattr(run, name).load_state_dict(value)


def load_if_any(run: "Run", name: str, value: dict) -> None:
    if value:  # empty if saved at a precision that needs none
        load(run, name, value)


def load_average(run: "Run", name: str, value: dict | None) -> None:
    if run.average:
        run.average.load_state_dict(value or {})


def load_optimizer(run: "Run", name: str, value: dict) -> None:
    load(run, name, value)
    for parameter, state in run.optimizer.state.items():  # torch does not check shapes, and crashes later
        if any(part.ndim and part.shape != parameter.shape for part in state.values() if torch.is_tensor(part)):
            raise ValueError("its optimizer belongs to another network")


def put_ranking(run: "Run", name: str, value: torch.Tensor) -> None:
    if value.shape != run.ranking.shape:
        raise ValueError(f"its ranking has the shape {tuple(value.shape)}, expected {tuple(run.ranking.shape)}")
    run.ranking = value.to(run.hardware.device)


def put_micro_batch(run: "Run", name: str, value: int | None) -> None:
    run.micro_batch = run.hardware.micro_batch or value  # the command line wins


@dataclass(frozen=True)
class Saved:
    """How a checkpoint holds a piece of state.

    kind : its type there; dict for an object with a `state_dict`
    restore : function of (run, name, value) that restores it
    later : missing in checkpoints of earlier versions, for which it keeps its default
    """

    kind: Kind
    restore: Callable[["Run", str, Any], None]
    later: bool


def saved(kind: Kind, restore: Callable = put, later: bool = False, **default: Any) -> Any:
    """Declare a field that checkpoints hold; see `Saved`. default : `default` or `default_factory`."""
    return field(metadata={"saved": Saved(kind, restore, later)}, **default)


# --- the state ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training: what it works with, and its state."""

    recipe: Recipe
    hardware: Hardware
    normalise: Normalisation
    class_weights: torch.Tensor  # (n_classes,) of the E-loss
    class_counts: torch.Tensor  # (n_classes,) distinct training samples
    seed: int
    network: torch.nn.Module  # the model, wrapped where several processes train it

    model: torch.nn.Module = saved(dict, load)
    optimizer: torch.optim.Optimizer = saved(dict, load_optimizer)
    scaler: torch.amp.GradScaler = saved(dict, load_if_any)
    # (2, n_rows, 3): in this epoch and in total; times ranked, times kept, sum of losses
    ranking: torch.Tensor = saved(torch.Tensor, put_ranking)
    epoch: int = saved(int, default=0)
    step: int = saved(int, default=0)  # batches done in this epoch
    loss_sum: float = saved(NUMBER, default=0.0)  # over those batches
    skipped: int = saved(int, later=True, default=0)  # of those batches, because they overflowed in float16
    seconds: float = saved(NUMBER, default=0.0)  # spent on this epoch
    best_score: float = saved(NUMBER, default=-math.inf)
    # images that are in memory at once; None = the whole batch
    micro_batch: int | None = saved((int, type(None)), put_micro_batch, default=None)
    start: str = saved(str, default="")  # what it started from, in words
    start_file: str = saved(str, later=True, default="")  # the path of its weights, from its own folder
    returns: list[str] = saved(list, default_factory=list)  # where it returned to the last good state
    history: list[dict] = saved(list, default_factory=list)  # the log, a row per epoch
    class_mix: list[dict] = saved(list, default_factory=list)  # what the hard sampler kept, by epoch and class

    continued: list[int] = saved(list, later=True, default_factory=list)  # epochs after which it ended and continued
    average: Average | None = saved(dict, load_average, later=True, default=None)  # of the weights, if the recipe asks

    good: dict | None = None  # the state at the start of this epoch, if the run may return to it
    fitting: Fitting = field(default_factory=Fitting)  # of the validation

    def state(self) -> dict:
        """Return the content of a checkpoint: what prediction needs, and each saved piece."""
        pieces = {name: getattr(self, name) for name in saved_pieces(self)}
        return {
            **self.network_state(),
            **{
                name: piece.state_dict() if hasattr(piece, "state_dict") else piece
                for name, piece in pieces.items()
                if name != "average" or piece
            },
        }

    def restore(self, state: dict) -> None:
        """Restore a saved state.

        Raises KeyError, RuntimeError or ValueError if it is another network's or has missing parts.
        """
        for name, how in saved_pieces(self).items():
            if name in state or not how.later:
                how.restore(self, name, state[name])

    @property
    def valid_losses(self) -> list[float]:
        return [row["valid_loss"] for row in self.history if "valid_loss" in row]

    @property
    def trained(self) -> torch.nn.Module:
        """The network that is validated and predicts: with averaged weights, if the recipe asks for them."""
        return self.average.model if self.average else self.model

    def network_state(self) -> dict:
        """Return what prediction needs: weights, normalisation, classes, and recipe and format to check them."""
        return {
            "model": self.trained.state_dict(),
            "mean": list(self.normalise.mean),
            "std": list(self.normalise.std),
            "classes": list(CLASS_NAMES),
            "recipe": to_dict(self.recipe),
            "format": FORMAT,
        }


def saved_pieces(run: Run | type[Run]) -> dict[str, Saved]:
    """Return how checkpoints hold each piece of a run's state, by name."""
    return {piece.name: piece.metadata["saved"] for piece in fields(run) if "saved" in piece.metadata}


# --- beginnings --------------------------------------------------------------------------------------------


def seed_torch(*numbers: int) -> None:
    """Seed torch from several numbers: random draws (weights, dropout) become a function of them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    # Without a GPU, torch.manual_seed stores a traceback at each call, in case a GPU is used later.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def new_run(
    recipe: Recipe,
    data: FoldData,
    hardware: Hardware,
    fold: int,
    seed: int,
    weights: dict | None = None,
    rates: tuple[float, ...] | None = None,
) -> Run:
    """Return a run before its first step; parameters not in `weights` depend on seed and fold only.

    weights : pretrained parameters of the encoder; rates : top learning rates instead of the recipe's
    """
    set_kernels(hardware)
    device = hardware.device
    seed_torch(seed, fold)
    model = build_model(recipe, N_CLASSES, weights)
    if recipe.sync_batchnorm and hardware.team.size > 1:
        model = synchronised(model)
    # The stubs allow a device or a memory format, not both.
    model = model.to(device, memory_format=hardware.memory_format)  # type: ignore[call-overload]
    groups = param_groups(model, rates or recipe.group_learning_rates)
    freeze(groups)
    weights_of_classes = effective_number_weights(data.counts, recipe.alpha, recipe.class_weights)
    return Run(
        recipe=recipe,
        hardware=hardware,
        normalise=data.normalisation,
        class_weights=torch.tensor(weights_of_classes, dtype=torch.float32, device=device),
        class_counts=torch.tensor(data.counts, dtype=torch.float32, device=device),
        seed=seed,
        network=wrapped(model, hardware),
        model=model,
        optimizer=build_optimizer(recipe, groups),
        scaler=torch.amp.GradScaler(device.type, enabled=hardware.autocast == torch.float16),
        ranking=torch.zeros(2, len(data.train), 3, device=device),
        average=Average(model, recipe.ema) if recipe.ema else None,
        micro_batch=hardware.micro_batch,
    )


def wrapped(model: torch.nn.Module, hardware: Hardware) -> torch.nn.Module:
    """Return the model as it is trained: shared by several processes, compiled, or as it is."""
    network = model
    if hardware.team.size > 1:
        network = DistributedDataParallel(model, device_ids=[hardware.device] if hardware.is_gpu else None)
    if hardware.compiled:
        network = cast(torch.nn.Module, torch.compile(network))  # a function in the stubs
    return network


def check_team(recipe: Recipe, n_rows: int, hardware: Hardware) -> None:
    """Refuse several processes with too few images each for BatchNorm; warn if there are few.

    Each process normalises over its own images.
    """
    size = hardware.team.size
    each = min(recipe.batch_size, n_rows) // size
    if size == 1 or recipe.pooling == "own":  # GapNet-PL has no BatchNorm
        return
    if recipe.sync_batchnorm and not hardware.is_gpu:
        raise UserError("sync_batchnorm works on GPUs only; leave it out, or train in one process")
    if each < 2 and not recipe.sync_batchnorm:
        raise UserError(
            f"a batch of {recipe.batch_size} leaves {size} processes {each} image each, and BatchNorm needs two; "
            "start fewer processes, or give a larger batch: --set batch_size=..."
        )
    if each < ENOUGH_IMAGES and not recipe.sync_batchnorm and hardware.team.is_main:
        cure = "--set sync_batchnorm=true, " if hardware.is_gpu else ""
        print(
            f"warning: each of {size} processes normalises over {each} images only, which can cost much of the score; "
            f"use {cure}a larger batch, or fewer processes",
            file=sys.stderr,
            flush=True,
        )


def epoch_batches(run: Run, data: FoldData, epoch: int, start: int = 0) -> EpochBatches:
    """Return an epoch's batches, starting at number `start`."""
    return EpochBatches(
        len(data.train),
        run.recipe.batch_size,
        run.seed,
        epoch,
        start,
        run.hardware.team,
        draw_weights(data.train.targets, run.recipe.class_balance),
    )
