"""Optimizers and their groups of parameters: SGD, AdamW, and Muon.

Muon takes steps of momentum whose directions are all equally long (Jordan et al. 2024), for the weights of convolutions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common.recipes import Recipe
from common.train.networks import SPLITS, Classifier

# Of the quintic iteration: steep at 0, so that five of them bring singular values between 0.0015 and 1 to 0.68 to 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
RMS = 0.2  # of a step of AdamW, which steps here are as large as (Liu et al. 2025)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (m, n) with its singular values brought to about 1, its singular vectors as they are.

    Each iteration multiplies by a polynomial of the matrix and its transpose. Those commute, so all are multiplied in the
    smaller of the two spaces first and meet the matrix once: a third of the work where n is 9 m, as in a convolution.
    """
    a, b, c = COEFFICIENTS
    tall = len(matrix) > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=EPSILON)
    gram = wide @ wide.T
    product = None
    for i in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if i < ITERATIONS - 1:
            gram = factor @ gram @ factor
    wide = product @ wide
    return wide.T if tall else wide


class Muon(torch.optim.AdamW):
    """Muon with Nesterov's momentum for the groups of parameters that say `muon`, AdamW for the others.

    Weights (m, ...) count as matrices (m, n); a Muon group's momentum is its first beta. Steps are as large as AdamW's, so
    rates and decay mean the same for both. Where AdamW is `fused`, a gradient scaler leaves its scale and whether anything
    overflowed to the step, as attributes `grad_scale` and `found_inf`, so that nothing waits for the GPU.
    """

    __setstate__ = torch.optim.Optimizer.__setstate__  # AdamW's looks for its own state in every parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    self._step_of(parameter, group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step_of(self, parameter: torch.Tensor, group: dict) -> None:
        state, momentum = self.state[parameter], group["betas"][0]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        assert parameter.grad is not None
        gradient = parameter.grad if scale is None else parameter.grad / scale
        changed = (parameter, state["momentum"])
        before = [] if found_inf is None else [tensor.clone() for tensor in changed]
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        update = orthogonalised(gradient.lerp(average, momentum).flatten(1))
        size = group["lr"] * RMS * math.sqrt(max(update.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(parameter), alpha=-size)
        if found_inf is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(found_inf > 0, old, tensor))


def build_optimizer(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW or Muon, which leave biases and normalisation layers without decay."""
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
        for (
            group
        ) in groups:  # torch leaves them unset where a first step overflows in float16, and uses them in the next
            for parameter in group["params"] if recipe.momentum else ():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    parts = [
        {
            **group,
            "params": [p for p in group["params"] if p.ndim == dimensions],
            "muon": dimensions == 4,
            "weight_decay": recipe.weight_decay if dimensions > 1 else 0.0,
        }
        for group in groups
        for dimensions in (4, 2, 1)
    ]  # convolutions, dense layers, biases and normalisation layers
    optimizer = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
    return optimizer([part for part in parts if part["params"]], lr=0.0, betas=(recipe.momentum, 0.99), fused=True)


def param_groups(model: Classifier, rates: tuple[float, ...]) -> list[dict]:
    """Return optimizer groups with the top learning rates `rates`, first layers first.

    One rate: all layers. Two: encoder, head. Three: encoder in two parts (see SPLITS), head.
    """
    encoder = list(model.encoder.named_children())
    split = next(i for i, (name, _) in enumerate(encoder) if name in SPLITS)
    parts: list[list[nn.Module]] = [
        [module for _, module in encoder[:split]],
        [module for _, module in encoder[split:]],
        [model.head],
    ]
    if len(rates) < 3:
        parts = [parts[0] + parts[1], parts[2]]
    if len(rates) == 1:
        parts = [parts[0] + parts[1]]
    return [
        {"params": [p for module in modules for p in module.parameters()], "lr": rate, "top_lr": rate}
        for modules, rate in zip(parts, rates, strict=True)
    ]
