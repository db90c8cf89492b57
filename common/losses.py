"""E-loss and the hard sampler."""

import numpy as np
import torch
import torch.nn.functional as F

from common.recipes import Recipe


def effective_numbers(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Return Q_n = (1 - alpha^n) / (1 - alpha) for each class count n (below eq. 5): 1 at alpha 0, n at alpha -> 1."""
    with np.errstate(divide="ignore"):
        return -np.expm1(np.asarray(counts, dtype=np.float64) * np.log(alpha)) / (1 - alpha)


def effective_number_weights(counts: np.ndarray, alpha: float, kind: str = "normalised") -> np.ndarray:
    """Return the class weights 1 / Q_n of eq. 6, (n_classes,).

    counts : samples of each class in the whole training fold, never in a batch
    kind : normalised = the weights sum to the number of classes (Cui et al. 2019); raw = as in eq. 6; none = 1
    A class without samples has no Q_n; it gets the smallest weight, since there is nothing of it to learn.
    """
    counts = np.asarray(counts)
    if kind == "none" or not counts.any():
        return np.ones(len(counts))
    weights = 1 / effective_numbers(np.where(counts > 0, counts, counts.max()), alpha)
    return weights if kind == "raw" else weights * len(weights) / weights.sum()


def sample_losses(logits, targets, weights, recipe: Recipe):
    """Return the E-loss of each sample, (batch,): eq. 6 summed over its classes, on focal loss or BCE.

    logits, targets : (batch, n_classes); weights : (n_classes,) from `effective_number_weights`
    """
    logits, targets = logits.float(), targets.float()
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if recipe.base_loss == "focal":
        miss = torch.sigmoid(logits * (1 - 2 * targets))  # 1 - p of the true answer
        losses = losses * miss ** recipe.focal_gamma
    if recipe.weighted_part == "positives":
        weights = torch.where(targets > 0, weights, 1.0)
    losses = losses * weights
    return losses.sum(dim=1) if recipe.class_reduction == "sum" else losses.mean(dim=1)


def hard_samples(losses, share: float):
    """Return the indices of the K largest losses of a batch, K = share * B rounded, at least 1; ties: first come.

    losses : (batch,)
    """
    k = max(1, round(share * len(losses)))
    return torch.sort(losses.detach(), descending=True, stable=True).indices[:k]
