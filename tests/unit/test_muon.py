"""Muon: its directions against singular values, its steps against torch's own Muon and AdamW."""

import copy

import numpy as np
import pytest
import torch

from common.train.optimizers import COEFFICIENTS, Muon, orthogonalised


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "matrix",
    [
        random(16, 100),
        random(100, 16),
        random(32, 32),
        random(1, 9),
        random(7, 1),
        random(64, 3) @ random(3, 90, seed=1),
        1e-12 * random(8, 72),
        1e12 * random(8, 72),
    ],
    ids=["wide", "tall", "square", "row", "column", "of rank 3", "tiny", "huge"],
)
def test_singular_values_come_near_1_and_singular_vectors_stay(matrix):
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values /= max(np.sqrt((values**2).sum()), 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert orthogonalised(matrix).numpy() == pytest.approx(left * values @ right, abs=1e-4)
    assert torch.linalg.matrix_rank(matrix) == sum(values > 0.5) or matrix.abs().max() < 1e-7


def test_no_gradient_gives_no_direction():
    assert not orthogonalised(torch.zeros(4, 36)).any()


def parameters(*shapes):
    made = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    return made, copy.deepcopy(made)


def steps(optimizer, held, n=5, scaler=None, unscaled=False):
    for step in range(n):
        for i, parameter in enumerate(held):
            parameter.grad = random(*parameter.shape, seed=100 * step + i)
            if scaler:
                parameter.grad *= scaler.scale(torch.ones(()))
        if unscaled:
            scaler.unscale_(optimizer)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


def muon(convolutions, others=()):
    groups = [
        {"params": list(convolutions), "muon": True, "weight_decay": 0.3},
        {"params": list(others), "muon": False, "weight_decay": 0.1},
    ]
    return Muon(groups[: 1 + bool(others)], lr=0.02, betas=(0.9, 0.99), fused=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_its_steps_are_those_of_torchs_own_muon():
    ours, theirs = parameters((16, 36), (36, 16))
    steps(muon(ours), ours)
    steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b, before in zip(ours, theirs, parameters((16, 36), (36, 16))[0], strict=True):
        assert (a - b).norm() < 0.01 * (b - before).norm()  # torch's works in bfloat16


def test_a_convolution_is_the_matrix_of_its_flat_filters_in_any_memory_format():
    (flat,), (kernel,) = parameters((8, 36))
    kernel.data = kernel.data.view(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    gradient = random(8, 36)
    flat.grad, kernel.grad = gradient, gradient.view(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    muon([flat]).step()
    muon([kernel]).step()
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(kernel.flatten(1), flat, atol=1e-6)


def test_the_others_take_the_steps_of_adamw():
    ours, theirs = parameters((8, 4, 3, 3), (5, 7), (5,))
    steps(muon(ours[:1], ours[1:]), ours)
    steps(torch.optim.AdamW(theirs[1:], lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, fused=True), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_it_goes_on_from_its_state_exactly():
    ours, other = parameters((8, 4, 3, 3), (5, 7))
    optimizer = muon(ours[:1], ours[1:])
    steps(optimizer, ours)
    with torch.no_grad():
        for parameter, value in zip(other, ours, strict=True):
            parameter.copy_(value)
    again = muon(other[:1], other[1:])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, ours)
    steps(again, other)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("unscaled", [False, True])  # before the step, as for clipping
def test_a_scaled_loss_gives_the_same_steps_and_one_that_overflows_none(unscaled, monkeypatch):
    # A step that the scaler decides upon, not the optimizer, waits for the GPU.
    monkeypatch.setattr(
        torch.amp.GradScaler, "_maybe_opt_step", lambda *_: pytest.fail("the scaler reads what overflowed")
    )
    ours, scaled = parameters((8, 4, 3, 3), (5, 7))
    steps(muon(ours[:1], ours[1:]), ours)
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)  # so that steps have different scales
    optimizer = muon(scaled[:1], scaled[1:])
    steps(optimizer, scaled, scaler=scaler, unscaled=unscaled)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, scaled, strict=True))
    before = copy.deepcopy(([parameter.detach() for parameter in scaled], optimizer.state_dict()["state"]))
    scaler.scale(torch.ones(()))
    for parameter in scaled:
        parameter.grad = torch.full_like(parameter, torch.inf)
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(
        ([parameter.detach() for parameter in scaled], optimizer.state_dict()["state"]), before, rtol=0, atol=0
    )
