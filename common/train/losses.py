"""E-loss, the hard sampler, and what the sampler does: which classes it keeps, and which samples most often."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from common.artifacts.tables import write_csv
from common.classes import CLASS_NAMES
from common.data.labels import format_targets
from common.errors import UserError
from common.recipes import Recipe, row_of

# --- the table ---------------------------------------------------------------------------------------------


def bce(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the binary cross-entropy of each class, (batch, n_classes)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the focal loss of each class, (batch, n_classes): less of what is right already (Lin et al. 2017)."""
    miss = torch.sigmoid(logits * (1 - 2 * targets))  # 1 - p of the true answer
    # Below the smallest normal number its power would have an infinite slope, for a gamma below 1.
    return bce(logits, targets, recipe) * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** recipe.focal_gamma


# Base losses: functions of (logits, targets, recipe), (batch, n_classes) float32 each, that return the loss of each
# class, (batch, n_classes), before classes are weighted; differentiable, and finite for any finite logit.
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, Recipe], torch.Tensor]] = {"focal": focal, "bce": bce}


def sample_losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the E-loss of each sample, (batch,): eq. 6 summed over its classes, on the recipe's base loss.

    logits, targets : (batch, n_classes); weights : (n_classes,) from `class_weights`
    """
    logits, targets = logits.float(), targets.float()
    losses = row_of(LOSSES, "base_loss", recipe.base_loss)(logits, targets, recipe)
    if losses.shape != logits.shape:
        found = tuple(losses.shape)
        raise UserError(f"base_loss={recipe.base_loss} gives the shape {found}, expected {tuple(logits.shape)}")
    if recipe.weighted_part == "positives":
        weights = torch.where(targets > 0, weights, 1.0)
    losses = losses * weights
    return losses.sum(dim=1) if recipe.class_reduction == "sum" else losses.mean(dim=1)


# --- the hard sampler --------------------------------------------------------------------------------------


def hard_samples(losses: torch.Tensor, share: float) -> torch.Tensor:
    """Return the indices of the K largest losses of a batch, K = share * B rounded, at least 1; ties: first come.

    losses : (batch,)
    """
    k = max(1, round(share * len(losses)))
    return torch.sort(losses.detach(), descending=True, stable=True).indices[:k]


# --- what the sampler does ---------------------------------------------------------------------------------


def class_mix(epoch: int, targets: np.ndarray, ranked: np.ndarray, kept: np.ndarray) -> list[dict]:
    """Return a row a class: its share of the labels that were ranked in an epoch, and of those that were kept.

    targets : (n, n_classes) bool; ranked, kept : (n,) times in the epoch that a sample was ranked and kept
    A share among the kept above that among the ranked means that the class is trained on more than it is seen.
    """
    seen, stayed = ranked @ targets, kept @ targets
    shares = (seen / max(1, seen.sum()), stayed / max(1, stayed.sum()))
    return [
        {
            "epoch": epoch,
            "class": name,
            "ranked": int(seen[c]),
            "kept": int(stayed[c]),
            "share_of_ranked": round(float(shares[0][c]), 4),
            "share_of_kept": round(float(shares[1][c]), 4),
        }
        for c, name in enumerate(CLASS_NAMES)
    ]


def sample_table(
    ids: np.ndarray, targets: np.ndarray, ranked: np.ndarray, kept: np.ndarray, loss_sums: np.ndarray
) -> pd.DataFrame:
    """Return how often each Id was ranked and kept and its mean loss there; likely wrong labels first.

    A sample that is kept whenever it is ranked, at a high loss, is one that the network cannot agree with.
    """
    table = pd.DataFrame(
        {
            "Id": ids,
            "Target": format_targets(targets),
            "ranked": ranked.astype(int),
            "kept": kept.astype(int),
            "loss": loss_sums,
        }
    )
    table = table.groupby(["Id", "Target"], as_index=False).sum()  # copies of a sample together
    table = table[table["ranked"] > 0]
    table["share_kept"] = (table["kept"] / table["ranked"]).round(4)
    table["mean_loss"] = (table.pop("loss") / table["ranked"]).round(4)
    return table.sort_values(["share_kept", "mean_loss", "Id"], ascending=[False, False, True], ignore_index=True)


def save_telemetry(folder: Path, mix: list[dict], samples: pd.DataFrame) -> None:
    """Write hard_classes.csv and hard_samples.csv."""
    write_csv(folder / "hard_classes.csv", pd.DataFrame(mix))
    write_csv(folder / "hard_samples.csv", samples)
