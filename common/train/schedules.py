"""Learning rates as pure functions of the step, when training is over, and the rules that read loss curves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.recipes import Recipe, row_of

# --- the table ---------------------------------------------------------------------------------------------


def at_the_maximum(recipe: Recipe, epochs: int, losses: list[float]) -> bool:
    """Never end before the recipe's maximum of epochs."""
    return False


def describe_epochs(recipe: Recipe) -> str:
    return f"{recipe.epochs} epochs"


def may_depend_on_the_end(recipe: Recipe, losses: list[float]) -> str | None:
    """Refuse more cycles: unless a schedule says otherwise, its rates may depend on the number of epochs."""
    return f"with schedule={recipe.schedule}, learning rates depend on the number of epochs"


def can_continue(recipe: Recipe, losses: list[float]) -> str | None:
    """Allow more cycles: the rates of a step do not depend on how many follow."""
    return None


@dataclass(frozen=True)
class Schedule:
    """A row of SCHEDULES.

    factor : function of (recipe, step, steps, losses) that returns the factor on the top learning rates, finite and not
        below 0; step : of the run, from 0; steps : per epoch; losses : of the validations so far
    is_over : function of (recipe, epochs, losses) that tells whether training ends after this many epochs; called below
        the recipe's maximum of epochs
    describe : function of the recipe that returns its length in words
    why_no_more : function of (recipe, losses) that returns why a finished training cannot get more cycles, or None:
        then the training must be the one that had them from the start
    """

    factor: Callable[[Recipe, int, int, list[float]], float]
    is_over: Callable[[Recipe, int, list[float]], bool] = at_the_maximum
    describe: Callable[[Recipe], str] = describe_epochs
    why_no_more: Callable[[Recipe, list[float]], str | None] = may_depend_on_the_end


def gains_too_little(recipe: Recipe, epochs: int, losses: list[float]) -> bool:
    """Tell whether a cycle ends here that improved the best validation loss by too little."""
    if epochs % recipe.cycle_epochs:
        return False
    return cycle_gain(losses, evaluations_per_cycle(recipe)) < recipe.min_cycle_gain


def has_halved_enough(recipe: Recipe, epochs: int, losses: list[float]) -> bool:
    """Tell whether the rate would halve once more than the recipe allows, where it sets a limit."""
    return 0 < recipe.max_halvings < plateau_halvings(losses, recipe.patience)


def why_plateau_is_over(recipe: Recipe, losses: list[float]) -> str | None:
    """Refuse more cycles after the last halving."""
    if has_halved_enough(recipe, 0, losses):
        return f"its learning rate has halved max_halvings={recipe.max_halvings} times"
    return None


def describe_plateau(recipe: Recipe) -> str:
    return f"{recipe.epochs} epochs, halving" + f" {recipe.max_halvings} times" * (recipe.max_halvings > 0)


SCHEDULES = {
    "cycles": Schedule(
        lambda recipe, step, steps, losses: cosine_with_restarts(step, recipe.cycle_epochs * steps),
        gains_too_little,
        lambda recipe: f"{recipe.max_cycles} cycles of {recipe.cycle_epochs} epochs",
        can_continue,
    ),
    "constant": Schedule(lambda recipe, step, steps, losses: 1.0, gains_too_little, why_no_more=can_continue),
    "plateau": Schedule(
        lambda recipe, step, steps, losses: 0.5 ** plateau_halvings(losses, recipe.patience),
        has_halved_enough,
        describe_plateau,
        why_plateau_is_over,
    ),
    "one-cycle": Schedule(
        lambda recipe, step, steps, losses: one_cycle(step, recipe.epochs * steps, recipe.warmup_share),
        describe=lambda recipe: f"{recipe.epochs} epochs, one cycle",
    ),
}


def schedule_of(recipe: Recipe) -> Schedule:
    return row_of(SCHEDULES, "schedule", recipe.schedule)


def rate_factor(recipe: Recipe, step: int, steps: int, losses: list[float]) -> float:
    """Return the factor on the top learning rates; see `Schedule`. Raises UserError for an invalid one."""
    factor = schedule_of(recipe).factor(recipe, step, steps, losses)
    if not 0 <= factor < math.inf:
        raise UserError(f"schedule={recipe.schedule} returns the factor {factor} at step {step}, expected 0 or more")
    return factor


def is_over(recipe: Recipe, epochs: int, losses: list[float]) -> bool:
    """Tell whether training ends after this many epochs, below the recipe's maximum; see `Schedule`."""
    return schedule_of(recipe).is_over(recipe, epochs, losses)


def has_ended(recipe: Recipe, epochs: int, losses: list[float], continued: list[int]) -> bool:
    """Tell whether training ends after this many epochs: at the recipe's maximum, or when its schedule says so.

    continued : epochs after which it had ended, and got more cycles
    """
    return epochs >= recipe.epochs or (epochs not in continued and is_over(recipe, epochs, losses))


def is_evaluated(recipe: Recipe, epoch: int) -> bool:
    """Tell whether the validation part is predicted after this epoch, counted from 0."""
    place = epoch % recipe.cycle_epochs + 1
    return place % recipe.evaluate_epochs == 0 or place == recipe.cycle_epochs


def evaluations_per_cycle(recipe: Recipe) -> int:
    return sum(is_evaluated(recipe, epoch) for epoch in range(recipe.cycle_epochs))


# --- their functions ---------------------------------------------------------------------------------------


def cosine_with_restarts(step: int, cycle_steps: int) -> float:
    """Return the factor on the top learning rate: 1 at the start of each cycle, down a cosine towards 0."""
    return 0.5 * (1 + math.cos(math.pi * (step % cycle_steps) / cycle_steps))


def one_cycle(step: int, steps: int, warmup_share: float) -> float:
    """Return the factor on the top learning rates: along a cosine from 0 up to 1, then down to 0 (Smith 2018).

    warmup_share : share of all `steps` in which it rises
    """
    top = warmup_share * steps
    place = (step + 1) / top - 1 if step + 1 <= top else (step + 1 - top) / (steps + 1 - top)
    return 0.5 * (1 + math.cos(math.pi * place))


def plateau_halvings(losses: list[float], patience: int, threshold: float = 1e-4) -> int:
    """Return how often a rate was halved: each time after more than `patience` epochs without a better loss.

    losses : validation loss per epoch; better means lower by the share `threshold`
    """
    best, waited, halvings = math.inf, 0, 0
    for loss in losses:
        if loss < best * (1 - threshold):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            waited, halvings = 0, halvings + 1
    return halvings


def exponential_range(step: int, n_steps: int, low: float, high: float) -> float:
    """Return the learning rate of a range test's step: `low` at step 0, `high` at the last, exponential between."""
    return low * (high / low) ** (step / max(1, n_steps - 1))


def smoothed(values: list[float], beta: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start at zero."""
    average, result = 0.0, []
    for k, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        result.append(average / (1 - beta**k))
    return result


def has_diverged(losses: list[float]) -> bool:
    """Tell whether the last smoothed loss is not finite or above four times the best one."""
    curve = smoothed(losses)
    return not math.isfinite(curve[-1]) or curve[-1] > 4 * min(curve)


def centred(losses: list[float], widths: tuple[float, ...] = (1, 1.5, 2, 3, 4, 6, 8)) -> np.ndarray:
    """Return the losses smoothed without lag, up to the first that is not finite: (n,), n <= len(losses).

    Each value comes from a parabola fitted to the logarithms around it with Gaussian weights. It uses the one of the
    `widths`, in steps, that best predicts each loss from the others: a small one for a clean curve, so that a sharp
    rise stays sharp.
    """
    finite = np.isfinite(losses)
    n = len(losses) if finite.all() else int(finite.argmin())
    values, steps = np.log(np.maximum(losses[:n], 1e-12)), np.arange(n)
    best, least = values, math.inf
    for width in widths:
        near = (steps - steps[:, None]) / width  # (n, n): row = place of the parabola
        powers = np.stack([near**0, near, near**2], axis=2)
        weighted = powers * np.exp(-0.5 * near**2)[:, :, None]
        smoother = np.linalg.pinv(powers.transpose(0, 2, 1) @ weighted)[:, :1] @ weighted.transpose(
            0, 2, 1
        )  # (n, 1, n)
        curve = smoother[:, 0] @ values
        left_out = (values - curve) / np.maximum(
            1 - np.diagonal(smoother[:, 0]), 1e-9
        )  # error without the value itself
        if (error := float(np.square(left_out).sum())) < least:
            best, least = curve, error
    return np.exp(best)


def suggest_learning_rate(rates: list[float], losses: list[float]) -> float:
    """Return the highest learning rate at which the smoothed loss still falls: where it is lowest."""
    return rates[int(centred(losses).argmin())]


def steepest_learning_rate(rates: list[float], losses: list[float]) -> float:
    """Return the learning rate at which the smoothed loss falls fastest on the way to its lowest point.

    rates : growing exponentially, so slopes are over the logarithm of the rate
    """
    falls = slice(int(centred(losses).argmin()) + 1)
    curve = centred(losses, (6,))  # slopes need more smoothing than values
    return rates[int(np.gradient(curve)[falls].argmin())] if len(curve) > 1 else rates[0]


def cycle_gain(losses: list[float], cycle_epochs: int) -> float:
    """Return by what share the last cycle improved the best validation loss of the epochs before it.

    losses : validation loss per epoch, whole cycles; infinite gain for the first cycle
    """
    before, last = losses[:-cycle_epochs], losses[-cycle_epochs:]
    if not before:
        return math.inf
    return (min(before) - min(last)) / abs(min(before)) if min(before) else 0.0
