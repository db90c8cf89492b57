import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.class_weights import effective_number_weights, effective_numbers
from common.recipes import Recipe
from common.train.losses import LOSSES, hard_samples, lovasz_hinge, ranked_by, sample_losses

COUNTS = np.array([1, 2, 11, 500, 12885])


@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.99, 0.9999])
def test_the_closed_form_equals_the_recursion_of_eq_5(alpha):
    for n in COUNTS[:4]:
        q = 1.0
        for _ in range(n - 1):
            q = alpha * q + 1
        assert effective_numbers(np.array([n]), alpha)[0] == pytest.approx(q)


def test_effective_numbers_reach_their_limits():
    np.testing.assert_allclose(effective_numbers(COUNTS, 0.0), 1)
    np.testing.assert_allclose(effective_numbers(COUNTS, 1 - 1e-12), COUNTS, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "ratio"), [(0.9, 1.5), (0.99, 9.6), (0.999, 91), (0.9999, 659)])
def test_the_spread_of_weights_on_the_real_counts(alpha, ratio):
    weights = effective_number_weights(COUNTS[2:], alpha)
    assert weights.max() / weights.min() == pytest.approx(ratio, rel=0.05)
    assert weights.sum() == pytest.approx(3)


def test_raw_weights_are_those_of_eq_6_and_none_are_one():
    np.testing.assert_allclose(effective_number_weights(np.array([1, 2]), 0.9, "raw"), [1, 0.1 / 0.19])
    assert effective_number_weights(COUNTS, 0.9, "none").tolist() == [1] * 5


def test_a_class_without_samples_gets_the_smallest_weight():
    weights = effective_number_weights(np.array([0, 10, 100]), 0.99)
    assert np.isfinite(weights).all() and weights[0] == weights[2] == weights.min()
    assert effective_number_weights(np.zeros(3), 0.99).tolist() == [1, 1, 1]
    common, absent, rare, middle = effective_number_weights(np.array([1000, 0, 3, 40]), 0.99)
    assert rare > middle > common == absent


def test_the_loss_is_the_weighted_sum_of_focal_losses():
    logits, targets = torch.tensor([[0.3, -1.2], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([0.5, 1.5])
    p = logits.sigmoid()
    right = torch.where(targets > 0, p, 1 - p)
    expected = (-weights * (1 - right) ** 2 * right.log()).sum(dim=1)
    torch.testing.assert_close(sample_losses(logits, targets, weights, Recipe()), expected)
    torch.testing.assert_close(sample_losses(logits, targets, weights, Recipe(class_reduction="mean")), expected / 2)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0])
def test_gradients_are_finite_at_any_logit(gamma):
    values = torch.tensor([0.0, 1e-30, 1.0, 20.0, 80.0, 87.5, 100.0, 200.0, 1e4, 3e38])
    logits = torch.cat([values, -values]).repeat(2, 1).T.contiguous().requires_grad_()
    targets = torch.tensor([0.0, 1.0]).expand(20, 2)
    losses = sample_losses(logits, targets, torch.ones(2), Recipe(focal_gamma=gamma))
    assert losses.isfinite().all()
    losses.clamp(max=1e30).sum().backward()
    assert logits.grad.isfinite().all()


def test_bce_and_weights_on_positives_only():
    logits, targets, weights = torch.randn(4, 3), (torch.rand(4, 3) > 0.5).float(), torch.tensor([1.0, 2.0, 3.0])
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    recipe = Recipe(base_loss="bce", weighted_part="positives")
    torch.testing.assert_close(
        sample_losses(logits, targets, weights, recipe), (bce * (1 + targets * (weights - 1))).sum(dim=1)
    )


def test_the_loss_stays_finite_for_extreme_logits():
    logits = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = sample_losses(logits, torch.tensor([[1.0, 0.0]]), torch.ones(2), Recipe()).sum()
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_the_asymmetric_loss_is_its_formula():
    logits = torch.tensor([[-3.5, -1.0, 0.3, 2.0]])
    p = torch.sigmoid(logits.double())
    positive = -(1 - p) * p.log()
    negative = -((p - 0.05).clamp(min=0) ** 4) * (1 - (p - 0.05).clamp(min=0)).log()
    for targets, expected in ((torch.ones(1, 4), positive), (torch.zeros(1, 4), negative)):
        torch.testing.assert_close(LOSSES["asymmetric"](logits, targets, Recipe()), expected.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.02, 0.3])
def test_label_smoothing_with_cross_entropy_is_that_of_soft_labels(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 28, generator=generator), (torch.rand(5, 28, generator=generator) < 0.1).float()
    soft = targets * (1 - smoothing) + (1 - targets) * smoothing
    recipe = Recipe(base_loss="bce", label_smoothing=smoothing)
    expected = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").sum(dim=1)
    torch.testing.assert_close(sample_losses(logits, targets, torch.ones(28), recipe), expected)


def test_the_lovasz_hinge_is_the_jaccard_loss_of_whole_errors():
    """Where each error is 0 or 1, the Lovasz extension is the set function itself: 1 - intersection / union."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        targets, wrong = rng.random((2, 1, 6)) < 0.4
        predicted = targets ^ wrong
        union = (targets | predicted).sum()
        expected = 1 - (targets & predicted).sum() / union if union else 0.0
        margins = torch.from_numpy(np.where(wrong, 0.0, 1.0) * np.where(targets, 1, -1))  # errors of 1 and 0
        found = lovasz_hinge(margins, torch.from_numpy(targets).double())
        assert found.sum().item() == pytest.approx(expected)
        assert (found[~torch.from_numpy(wrong)] == 0).all()


def test_the_lovasz_loss_of_a_sample_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 28, generator=generator), (torch.rand(5, 28, generator=generator) < 0.1).float()
    whole = LOSSES["lovasz"](logits, targets, Recipe())
    torch.testing.assert_close(whole[2:3], LOSSES["lovasz"](logits[2:3], targets[2:3], Recipe()))


@pytest.mark.parametrize("ranking, first", [("loss", 0), ("positives", 1), ("rarest", 2)])
def test_what_the_sampler_ranks_by(ranking, first):
    """One sample has many labels and errors, one a bad only label, one a bad rare label beside a good common one."""
    targets = torch.tensor([[1.0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]])
    logits = torch.tensor([[-2.0, -2, -2, 3], [-5, -3, -5, -5], [5, -5, -5, -4]])
    recipe = Recipe(base_loss="bce", hard_ranking=ranking)
    weights, counts = torch.ones(4), torch.tensor([100.0, 90, 80, 5])
    losses = sample_losses(logits, targets, weights, recipe)
    ranked = ranked_by(losses, logits, targets, weights, counts, recipe)
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    expected = {
        "loss": each.sum(dim=1),
        "positives": torch.stack([each[k][targets[k] > 0].mean() for k in range(3)]),
        "rarest": torch.stack([each[0, 2], each[1, 1], each[2, 3]]),
    }
    torch.testing.assert_close(ranked, expected[ranking])
    assert hard_samples(ranked, 0.3).tolist() == [first]


def test_the_hard_sampler_keeps_the_largest():
    losses = torch.tensor([0.1, 0.9, 0.5, 0.7])
    assert hard_samples(losses, 0.5).tolist() == [1, 3]
    assert sorted(hard_samples(losses, 1.0).tolist()) == [0, 1, 2, 3]
    assert hard_samples(losses, 0.01).tolist() == [1]


@pytest.mark.parametrize("share", [0.1, 0.37, 0.7, 1.0])
def test_the_hard_sampler_equals_a_sort_also_with_ties(share):
    rng = np.random.default_rng(0)
    for _ in range(50):
        losses = rng.integers(0, 4, rng.integers(1, 20)) / 4  # few values: many ties
        expected = sorted(range(len(losses)), key=lambda i: (-losses[i], i))[: max(1, round(share * len(losses)))]
        assert hard_samples(torch.tensor(losses), share).tolist() == expected


def test_classes_absent_from_a_batch_keep_finite_weights():
    counts = np.array([1000, 3, 40])  # of the whole fold: the batch below has the first class only
    weights = torch.tensor(effective_number_weights(counts, 0.99), dtype=torch.float32)
    logits = torch.zeros(4, 3, requires_grad=True)
    loss = sample_losses(logits, torch.tensor([[1.0, 0, 0]] * 4), weights, Recipe()).mean()
    loss.backward()
    assert weights.isfinite().all() and loss.isfinite() and logits.grad.isfinite().all()


def test_ties_go_to_the_first():
    assert hard_samples(torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.5).tolist() == [1, 0]


def test_keeping_all_is_the_plain_mean():
    losses = torch.rand(10)
    torch.testing.assert_close(losses[hard_samples(losses, 1.0)].mean(), losses.mean())
