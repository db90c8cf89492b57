import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.recipes import get_recipe
from common.train.loop import is_finished, learning_rate_factor
from common.train.run import Run
from common.train.schedules import (
    centred,
    cosine_with_restarts,
    cycle_gain,
    exponential_range,
    has_diverged,
    is_evaluated,
    one_cycle,
    plateau_halvings,
    smoothed,
    steepest_learning_rate,
    suggest_learning_rate,
)


def test_a_loss_of_zero_cannot_be_improved():
    assert cycle_gain([0.0, 0.0, 0.0], 1) == 0.0
    assert cycle_gain([1.0, 0.0, 0.5, 0.5], 2) == 0.0


def test_start_middle_end_and_restart_of_a_cycle():
    assert cosine_with_restarts(0, 100) == cosine_with_restarts(100, 100) == 1
    assert cosine_with_restarts(50, 100) == pytest.approx(0.5)
    assert cosine_with_restarts(99, 100) < 0.001


def test_equals_torch_at_every_step():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    for step in range(30):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine_with_restarts(step, 7), abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_one_cycle_goes_up_for_its_share_and_down_to_almost_nothing(share):
    factors = [one_cycle(step, 100, share) for step in range(100)]
    top = round(share * 100)
    assert all(0 < factor <= 1 for factor in factors) and factors[-1] < 0.001
    assert factors[:top] == sorted(factors[:top]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) > 0.999 and (top == 0 or factors[top - 1] == 1)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_halving_on_a_plateau_equals_torch(patience):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
    rng, losses = random.Random(patience), []
    for _ in range(40):
        losses.append(1 / (1 + len(losses)) + rng.random())
        scheduler.step(losses[-1])
        # torch stops at steps below 1e-8
        assert optimizer.param_groups[0]["lr"] == max(0.5 ** plateau_halvings(losses, patience), 2**-26)


def flattening(epoch):
    """A validation loss that falls for 10 epochs and then stays constant."""
    return 1 / (1 + min(epoch, 9))


def driven(recipe, loss):
    """Return the factor on the learning rate in each epoch of a training with the given validation losses."""
    run = Run(recipe, *[None] * 10)
    factors = []
    while not is_finished(run):
        factors.append(learning_rate_factor(run, run.epoch, 1))
        if is_evaluated(recipe, run.epoch):
            run.history.append({"valid_loss": loss(run.epoch)})
        run.epoch += 1
    return factors


def test_gapnet_pl_halves_on_a_plateau_as_often_as_its_recipe_says_before_it_ends():
    recipe = get_recipe("gapnet_pl")
    assert driven(recipe, flattening) == [1] * 14 + [0.5] * 4 + [0.25] * 4 + [0.125] * 4 + [0.0625] * 4
    assert driven(replace(recipe, max_halvings=1), flattening) == [1] * 14 + [0.5] * 4
    assert len(driven(replace(recipe, max_halvings=0), flattening)) == recipe.epochs == 40
    assert driven(recipe, lambda epoch: 1 / (1 + epoch)) == [1] * 40
    assert driven(replace(recipe, cycle_epochs=3), flattening)[:18] == [1] * 14 + [0.5] * 4  # cycles do not count


def test_patience_counts_looks_at_the_validation_part():
    recipe = replace(get_recipe("gapnet_pl"), evaluate_epochs=2, patience=1, max_halvings=1)
    assert driven(recipe, lambda epoch: 1.0) == [1] * 6 + [0.5] * 4


def test_cycles_still_end_with_one_that_gains_nothing():
    assert len(driven(replace(get_recipe("resnet50"), schedule="constant", max_cycles=10), flattening)) == 16


def test_equal_losses_are_not_better():
    assert plateau_halvings([1.0] * 10, patience=2) == 3
    assert (
        plateau_halvings([1 - 1e-5 * k for k in range(10)], patience=2) == 3
    )  # each better by less than the threshold
    assert plateau_halvings([0.999**k for k in range(10)], patience=2) == 0
    assert plateau_halvings([1.0, 0.99989], patience=0) == 0 and plateau_halvings([1.0, 0.99991], patience=0) == 1


def test_the_range_is_exponential():
    rates = [exponential_range(k, 4, 1e-5, 1e-2) for k in range(4)]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])


def test_smoothing_has_no_bias_at_its_start():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0]) == pytest.approx([1.0, (0.09 * 1 + 0.1 * 2) / 0.19])


def test_a_range_of_one_step_is_its_low_end():
    assert exponential_range(0, 1, 1e-5, 10.0) == 1e-5


def test_divergence():
    assert not has_diverged([1.0, 2.0, 3.0])
    assert has_diverged([1.0, math.nan])
    assert has_diverged([1.0] * 5 + [100.0])
    assert not has_diverged([1.0, 6.6]) and has_diverged([1.0, 6.8])  # smoothed 3.95 and 4.05 times the best


def test_the_finder_on_a_noisy_quadratic_stops_where_gradient_descent_diverges():
    # On f(x) = a x^2 / 2 a step multiplies x by 1 - lr a: it shrinks below lr = 2 / a and grows above. Noise, as
    # of batches, keeps x from vanishing before that.
    rng, a, x, rates, losses = random.Random(0), 10.0, 10.0, [], []
    for k in range(400):
        rates.append(exponential_range(k, 400, 1e-5, 10))
        losses.append(a * x * x / 2)
        if has_diverged(losses):
            break
        x += -rates[-1] * a * x + rng.gauss(0, 0.5)
    assert 2 / a < rates[-1] < 4 * 2 / a
    assert 0.1 * 2 / a < suggest_learning_rate(rates, losses) < 2 / a


def valley(lowest, rise):
    """Return a loss as a function of log10 of the rate, lowest at `lowest`.

    It falls along a logistic curve, fastest at `lowest` - 1.2, and rises as a power of the rate.
    """
    fall = lambda x: 1 - 0.7 / (1 + np.exp(-3 * (x - lowest + 1.2)))
    slope = (fall(lowest - 1e-6) - fall(lowest + 1e-6)) / 2e-6  # which the rise must cancel there
    return lambda x: fall(x) + slope / (rise * math.log(10)) * 10 ** (rise * (x - lowest))


def range_test(loss, noise, seed):
    """Return the rates and losses of a range test, up to where it ends."""
    rates = [exponential_range(k, 100, 1e-5, 10) for k in range(100)]
    losses = (loss(np.log10(rates)) * (1 + noise * np.random.default_rng(seed).standard_normal(100))).tolist()
    n = next((k for k in range(1, 101) if has_diverged(losses[:k])), 100)
    return rates[:n], losses[:n]


STEP = math.log(10**6) / 99  # between two rates of a test


@pytest.mark.parametrize("lowest", [-3, -2, -1.25])
@pytest.mark.parametrize(
    "loss",
    [
        lambda m: valley(m, 2.5),
        lambda m: valley(m, 5),
        lambda m: valley(m, 10),
        lambda m: lambda x: 1 + (x - m) ** 2,
        lambda m: lambda x: 1 + np.where(x < m, (m - x) / 5, 3 * (x - m)),
    ],
)
def test_the_finder_suggests_the_lowest_point_without_the_lag_of_an_average(loss, lowest):
    found = math.log(suggest_learning_rate(*range_test(loss(lowest), 0, 0)) / 10**lowest)
    assert abs(found) <= 1.51 * STEP
    # Noise of 3 % of each loss moves it by chance, not to one side.
    errors = [
        math.log(suggest_learning_rate(*range_test(loss(lowest), 0.03, seed)) / 10**lowest) / STEP for seed in range(9)
    ]
    assert -3.1 <= np.median(errors) <= 1.1


@pytest.mark.parametrize("rise", [2.5, 5, 10])
def test_the_steepest_point_is_found_too(rise):
    found = steepest_learning_rate(*range_test(valley(-1.5, rise), 0, 0))
    assert abs(math.log(found / 10**-2.7)) <= 2 * STEP
    rates, losses = range_test(valley(-1.5, rise), 0.02, 1)
    steepest = steepest_learning_rate(rates, losses)
    assert 0.5 < steepest / 10**-2.7 < 2 and steepest < suggest_learning_rate(rates, losses)


def test_a_clean_curve_stays_sharp_and_a_noisy_one_is_smoothed():
    clean = valley(-2, 10)(np.linspace(-5, -1.8, 54))
    assert centred(clean.tolist()) == pytest.approx(clean, rel=0.03)
    noisy = (1 + 0.1 * np.random.default_rng(0).standard_normal(60)).tolist()
    assert centred(noisy).std() < 0.6 * np.std(noisy)


def test_nan_does_not_mislead_the_finder():
    assert suggest_learning_rate([1, 2, 3, 4], [3.0, 2.0, 1.0, math.nan]) == 3
    assert suggest_learning_rate([1, 2, 3, 4], [3.0, 2.0, math.inf, 1.0]) == 2
    assert suggest_learning_rate([1], [3.0]) == steepest_learning_rate([1], [3.0]) == 1


def test_the_gain_of_a_cycle_is_over_the_best_before_it():
    assert cycle_gain([4.0, 2.0], 2) == math.inf
    assert cycle_gain([4.0, 2.0, 3.0, 1.0], 2) == pytest.approx(0.5)
    assert cycle_gain([4.0, 2.0, 3.0, 2.5], 2) == pytest.approx(-0.25)
