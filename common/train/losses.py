"""E-loss and the hard sampler."""

import torch
import torch.nn.functional as F

from common.recipes import Recipe


def sample_losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the E-loss of each sample, (batch,): eq. 6 summed over its classes, on focal loss or BCE.

    logits, targets : (batch, n_classes); weights : (n_classes,) from `class_weights`
    """
    logits, targets = logits.float(), targets.float()
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if recipe.base_loss == "focal":
        miss = torch.sigmoid(logits * (1 - 2 * targets))  # 1 - p of the true answer
        # Below the smallest normal number its power would have an infinite slope, for a gamma below 1.
        losses = losses * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** recipe.focal_gamma
    if recipe.weighted_part == "positives":
        weights = torch.where(targets > 0, weights, 1.0)
    losses = losses * weights
    return losses.sum(dim=1) if recipe.class_reduction == "sum" else losses.mean(dim=1)


def hard_samples(losses: torch.Tensor, share: float) -> torch.Tensor:
    """Return the indices of the K largest losses of a batch, K = share * B rounded, at least 1; ties: first come.

    losses : (batch,)
    """
    k = max(1, round(share * len(losses)))
    return torch.sort(losses.detach(), descending=True, stable=True).indices[:k]
