"""E-loss, the hard sampler, and statistics of it: which classes it keeps, and which samples most often."""

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
    """Return the focal loss of each class, (batch, n_classes): easy samples count less (Lin et al. 2017)."""
    miss = torch.sigmoid(logits * (1 - 2 * targets))  # 1 - p of the true answer
    # For a gamma below 1, the power has an infinite slope at 0.
    return bce(logits, targets, recipe) * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** recipe.focal_gamma


def asymmetric(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the asymmetric loss of each class, (batch, n_classes): easy negatives count least (Ridnik et al. 2021).

    The powers and the margin are its authors' defaults.
    """
    p = torch.sigmoid(logits)
    excess = (p - ASYMMETRIC_MARGIN).clamp(min=0)  # negatives below the margin count for nothing
    positive, negative = (1 - p) * F.softplus(-logits), -(excess**4) * torch.log1p(-excess)
    return torch.where(targets > 0, positive, negative)


ASYMMETRIC_MARGIN = 0.05


def lovasz(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return focal loss plus the Lovasz hinge of each class, (batch, n_classes), as the 1st place of 2018 trained.

    The hinge (Berman et al. 2018) stands for the Jaccard index of a sample's labels, and for that of the labels that it
    does not have. The 1st place took that of the whole batch; here a sample's loss does not depend on the others.
    """
    return focal(logits, targets, recipe) + (lovasz_hinge(logits, targets) + lovasz_hinge(-logits, 1 - targets)) / 2


def lovasz_hinge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each class's part of a sample's Lovasz hinge, (batch, n_classes), whose sum over classes it is."""
    errors, order = torch.sort(1 - logits * (2 * targets - 1), dim=1, descending=True)
    hits = targets.gather(1, order)
    union = hits.sum(dim=1, keepdim=True) + (1 - hits).cumsum(dim=1)
    jaccard = 1 - (hits.sum(dim=1, keepdim=True) - hits.cumsum(dim=1)) / union  # of the worst 1, 2, ... as errors
    steps = torch.diff(jaccard, dim=1, prepend=torch.zeros_like(jaccard[:, :1]))
    return torch.zeros_like(errors).scatter(1, order, errors.relu() * steps)


# Base losses: functions of (logits, targets, recipe), (batch, n_classes) float32 each, that return the loss of each
# class, (batch, n_classes), before classes are weighted; differentiable, and finite for any finite logit.
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, Recipe], torch.Tensor]] = {
    "focal": focal,
    "bce": bce,
    "asymmetric": asymmetric,
    "lovasz": lovasz,
}


def sample_losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the E-loss of each sample, (batch,): eq. 6 summed over its classes, on the recipe's base loss.

    logits, targets : (batch, n_classes); weights : (n_classes,) from `class_weights`
    """
    losses = class_losses(logits, targets, weights, recipe)
    return losses.sum(dim=1) if recipe.class_reduction == "sum" else losses.mean(dim=1)


def class_losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the weighted loss of each class, (batch, n_classes): a term of eq. 6; see `sample_losses`."""
    logits, targets = logits.float(), targets.float()
    base = row_of(LOSSES, "base_loss", recipe.base_loss)
    losses = base(logits, targets, recipe)
    if losses.shape != logits.shape:
        found = tuple(losses.shape)
        raise UserError(f"base_loss={recipe.base_loss} returns the shape {found}, expected {tuple(logits.shape)}")
    if smoothing := recipe.label_smoothing:
        losses = (1 - smoothing) * losses + smoothing * base(logits, 1 - targets, recipe)
    if recipe.weighted_part == "positives":
        weights = torch.where(targets > 0, weights, 1.0)
    return losses * weights


# --- the hard sampler --------------------------------------------------------------------------------------


def mean_of_positives(losses: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (losses * targets).sum(dim=1) / targets.sum(dim=1).clamp(min=1)


def of_rarest(losses: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    rarest = torch.where(targets > 0, counts, torch.inf).argmin(dim=1, keepdim=True)
    return (losses * targets).gather(1, rarest).squeeze(1)


# What the sampler ranks samples by: functions of (losses, targets, counts), (batch, n_classes), the same, and the
# classes' numbers of training samples, (n_classes,), that return (batch,). The paper's, the loss of eq. 6, sums over all
# classes, so samples with several labels rank first.
RANKINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "loss": lambda losses, targets, counts: losses.sum(dim=1),
    "positives": mean_of_positives,
    "rarest": of_rarest,
}


def ranked_by(
    losses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    recipe: Recipe,
) -> torch.Tensor:
    """Return what the sampler ranks a batch by, (batch,), without gradients; see RANKINGS.

    losses : of the samples, (batch,); logits, targets, weights : as for `sample_losses`
    """
    if recipe.hard_ranking == "loss":
        return losses.detach()
    with torch.no_grad():
        each = class_losses(logits, targets, weights, recipe)
        return row_of(RANKINGS, "hard_ranking", recipe.hard_ranking)(each, targets.float(), counts)


def hard_samples(losses: torch.Tensor, share: float) -> torch.Tensor:
    """Return the indices of the K largest losses of a batch, K = share * B rounded, at least 1; ties: first first.

    losses : (batch,)
    """
    k = max(1, round(share * len(losses)))
    return torch.sort(losses.detach(), descending=True, stable=True).indices[:k]


# --- statistics of the sampler -----------------------------------------------------------------------------


def class_mix(epoch: int, targets: np.ndarray, ranked: np.ndarray, kept: np.ndarray) -> list[dict]:
    """Return a row per class: its share of the labels that were ranked in an epoch, and of those that were kept.

    targets : (n, n_classes) bool; ranked, kept : (n,) times in the epoch that a sample was ranked and kept
    If its share among the kept is above that among the ranked, the sampler trains on the class more often.
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
