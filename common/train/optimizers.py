"""Optimizers and their groups of parameters: SGD, AdamW, and Muon.

Muon orthogonalises the momentum before each step (Jordan et al. 2024); it is for weights of convolutions.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.recipes import Recipe, row_of
from common.train.networks import Classifier

# Of the quintic iteration: steep at 0, so five iterations bring singular values in [0.0015, 1] into [0.68, 1.21].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
RMS = 0.2  # of a step, to match AdamW's (Liu et al. 2025)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (m, n) with singular values of about 1 and the same singular vectors.

    Each iteration multiplies by a polynomial of the matrix and its transpose. Those commute, so they are multiplied in
    the smaller of the two spaces, and with the matrix only once. That is a third of the work if n is 9 m, as in a
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
    """Muon with Nesterov's momentum for the parameter groups marked `muon`, AdamW for the others.

    Weights (m, ...) are treated as matrices (m, n). A Muon group's momentum is its first beta. Steps are as large as
    AdamW's, so rates and decay mean the same for both. If AdamW is `fused`, a gradient scaler passes its scale, and
    whether anything overflowed, to the step as attributes `grad_scale` and `found_inf`, so nothing waits for the GPU.
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
        if parameter.grad is None:  # frozen
            return
        state, momentum = self.state[parameter], group["betas"][0]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
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
    """Return SGD with momentum; its decay is L2 on all parameters."""
    optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay, **STEADY)
    # If the first step overflows in float16, torch leaves them unset, and uses them in the next step.
    for parameter in all_parameters(groups) if recipe.momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return AdamW; its decay is decoupled, and on weights only."""
    return torch.optim.AdamW(by_dimensions(recipe, groups), betas=(recipe.momentum, 0.99), **STEADY)


def muon(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return Muon for the weights of convolutions, with AdamW for the others."""
    return Muon(by_dimensions(recipe, groups), betas=(recipe.momentum, 0.99), **STEADY)


STEADY: dict[str, Any] = {"lr": 0.0, "fused": True}  # the schedule sets the rate before each step

# Functions of (recipe, groups of parameters with their `lr` and `top_lr`). All state is in `Optimizer.state`,
# from which `Run` checkpoints it: tensors of a parameter's shape, or numbers.
OPTIMIZERS: dict[str, Callable[[Recipe, list[dict]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer. Raises UserError unless it holds each parameter once, with its top rate."""
    optimizer = row_of(OPTIMIZERS, "optimizer", recipe.optimizer)(recipe, groups)
    held, given = (sorted(map(id, all_parameters(part))) for part in (optimizer.param_groups, groups))
    if held != given:
        raise UserError(f"optimizer={recipe.optimizer} must hold all given parameters once and no others")
    if not all("top_lr" in group for group in optimizer.param_groups):
        raise UserError(f"optimizer={recipe.optimizer} has groups without 'top_lr'; derive them from the given groups")
    return optimizer


def all_parameters(groups: list[dict]) -> Iterator[nn.Parameter]:
    for group in groups:
        yield from group["params"]


# --- groups of parameters ----------------------------------------------------------------------------------


def by_dimensions(recipe: Recipe, groups: list[dict]) -> list[dict]:
    """Split groups into convolutions (for Muon), dense layers, and all other parameters (without decay)."""
    parts = [
        {
            **group,
            "params": [p for p in group["params"] if kind(p) == wanted],
            "muon": wanted == "convolution",
            "weight_decay": 0.0 if wanted == "other" else recipe.weight_decay,
        }
        for group in groups
        for wanted in ("convolution", "dense", "other")
    ]
    return [part for part in parts if part["params"]]


def kind(parameter: torch.Tensor) -> str:
    """Return what a parameter is by its shape: the weights of a convolution or a dense layer, or another.

    Others are biases, normalisation, scales, and tokens and embeddings of positions, (1, ...) of any dimensions.
    """
    if parameter.ndim >= 4 and len(parameter) > 1:
        return "convolution"
    return "dense" if parameter.ndim == 2 else "other"


def param_groups(model: Classifier, rates: tuple[float, ...]) -> list[dict]:
    """Return optimizer groups with the top learning rates `rates`, first layers first.

    One rate: all layers. Two: encoder, head. Three: encoder in two halves (see `Classifier.halves`), head.
    """
    first, second = model.halves()
    parts = [first, second, list(model.head.parameters())]
    if len(rates) < 3:
        parts = [parts[0] + parts[1], parts[2]]
    if len(rates) == 1:
        parts = [parts[0] + parts[1]]
    return [{"params": part, "lr": rate, "top_lr": rate} for part, rate in zip(parts, rates, strict=True)]


def freeze(groups: list[dict]) -> None:
    """Let the groups with a rate of 0 have no gradients: the backward pass stops before frozen first layers."""
    for group in groups:
        if group["top_lr"] == 0:
            for parameter in group["params"]:
                parameter.requires_grad_(False)


class Average:
    """The exponential moving average of a model's weights and running statistics, which is validated and kept.

    decay : of what it holds, per step; early steps count for more, (1 + step) / (10 + step), so that the weights of the
        start are soon forgotten
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model after step number `step` of the run, from 0 on."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in averaged], [new for _, new in averaged], share)
        for own, new in pairs:
            if not own.is_floating_point():  # counts of batches
                own.copy_(new)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
