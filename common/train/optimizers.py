"""Optimizers and their groups of parameters: SGD, AdamW, and Muon.

Muon takes steps of momentum whose directions are all equally long (Jordan et al. 2024), for weights of convolutions.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.recipes import Recipe, row_of
from common.train.networks import Classifier

# Of the quintic iteration: steep at 0, so that five of them bring singular values between 0.0015 and 1 to 0.68 to 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
RMS = 0.2  # of a step of AdamW, which steps here are as large as (Liu et al. 2025)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (m, n) with its singular values brought to about 1, its singular vectors as they are.

    Each iteration multiplies by a polynomial of the matrix and its transpose. Those commute, so all are multiplied in
    the smaller of the two spaces first and meet the matrix once: a third of the work where n is 9 m, as in a
    convolution.
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

    Weights (m, ...) count as matrices (m, n); a Muon group's momentum is its first beta. Steps are as large as AdamW's,
    so rates and decay mean the same for both. Where AdamW is `fused`, a gradient scaler leaves its scale and whether
    anything overflowed to the step, as attributes `grad_scale` and `found_inf`, so that nothing waits for the GPU.
    """

    __setstate__ = torch.optim.Optimizer.__setstate__  # AdamW's expects its own state in every parameter

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


# --- the table ---------------------------------------------------------------------------------------------


def sgd(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return SGD with momentum, whose decay is L2 on all parameters."""
    optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay, **STEADY)
    # torch leaves them unset where a first step overflows in float16, and uses them in the next
    for parameter in all_parameters(groups) if recipe.momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return AdamW, whose decay is decoupled and of weights only."""
    return torch.optim.AdamW(by_dimensions(recipe, groups), betas=(recipe.momentum, 0.99), **STEADY)


def muon(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return Muon for the weights of convolutions, with AdamW for the others."""
    return Muon(by_dimensions(recipe, groups), betas=(recipe.momentum, 0.99), **STEADY)


STEADY: dict[str, Any] = {"lr": 0.0, "fused": True}  # the schedule sets the rate before each step

# Functions of (recipe, groups of parameters with their `lr` and `top_lr`). All state is the optimizer's own, in
# `Optimizer.state`, from which `Run` checkpoints it: tensors of a parameter's shape, or numbers.
OPTIMIZERS: dict[str, Callable[[Recipe, list[dict]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer. Raises UserError for one that leaves parameters out or forgets their top rates."""
    optimizer = row_of(OPTIMIZERS, "optimizer", recipe.optimizer)(recipe, groups)
    held = {id(parameter) for parameter in all_parameters(optimizer.param_groups)}
    if held != {id(parameter) for parameter in all_parameters(groups)}:
        raise UserError(f"optimizer={recipe.optimizer} does not hold all parameters, and no others")
    if not all("top_lr" in group for group in optimizer.param_groups):
        raise UserError(
            f"optimizer={recipe.optimizer} has groups without 'top_lr'; make them of those that it is given"
        )
    return optimizer


def all_parameters(groups: list[dict]) -> Iterator[nn.Parameter]:
    for group in groups:
        yield from group["params"]


# --- groups of parameters ----------------------------------------------------------------------------------


def by_dimensions(recipe: Recipe, groups: list[dict]) -> list[dict]:
    """Split groups into convolutions (for Muon), dense layers, and biases and normalisation layers (without decay)."""
    parts = [
        {
            **group,
            "params": [p for p in group["params"] if p.ndim == dimensions],
            "muon": dimensions == 4,
            "weight_decay": recipe.weight_decay if dimensions > 1 else 0.0,
        }
        for group in groups
        for dimensions in (4, 2, 1)
    ]
    return [part for part in parts if part["params"]]


def param_groups(model: Classifier, rates: tuple[float, ...]) -> list[dict]:
    """Return optimizer groups with the top learning rates `rates`, first layers first.

    One rate: all layers. Two: encoder, head. Three: encoder in two parts (see `Encoder.split`), head.
    """
    encoder = list(model.encoder.named_children())
    split = [name for name, _ in encoder].index(model.split)
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
