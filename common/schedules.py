"""Learning rates as pure functions of the step, and the rules that read loss curves."""

import math


def cosine_with_restarts(step: int, cycle_steps: int) -> float:
    """Return the factor on the top learning rate: 1 at the start of each cycle, down a cosine towards 0."""
    return 0.5 * (1 + math.cos(math.pi * (step % cycle_steps) / cycle_steps))


def one_cycle(step: int, steps: int, warmup_share: float) -> float:
    """Return the factor on the top learning rates: along a cosine from 0 up to 1, then down to 0 (Smith 2018).

    warmup_share : share of all `steps` that go up
    """
    top = warmup_share * steps
    place = (step + 1) / top - 1 if step + 1 <= top else (step + 1 - top) / (steps + 1 - top)
    return 0.5 * (1 + math.cos(math.pi * place))


def plateau_halvings(losses: list[float], patience: int, threshold: float = 1e-4) -> int:
    """Return how often a rate has halved: each time after more than `patience` epochs without a better loss.

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
        result.append(average / (1 - beta ** k))
    return result


def has_diverged(losses: list[float]) -> bool:
    """Tell whether the last smoothed loss is not finite or above four times the best one."""
    curve = smoothed(losses)
    return not math.isfinite(curve[-1]) or curve[-1] > 4 * min(curve)


def suggest_learning_rate(rates: list[float], losses: list[float]) -> float:
    """Return the highest learning rate at which the smoothed loss still falls: where it is lowest."""
    curve = [value if math.isfinite(value) else math.inf for value in smoothed(losses)]
    return rates[curve.index(min(curve))]


def cycle_gain(losses: list[float], cycle_epochs: int) -> float:
    """Return by what share the last cycle improved the best validation loss of the epochs before it.

    losses : validation loss per epoch, whole cycles; infinite gain for the first cycle
    """
    before, last = losses[:-cycle_epochs], losses[-cycle_epochs:]
    if not before:
        return math.inf
    return (min(before) - min(last)) / abs(min(before)) if min(before) else 0.0
