"""Averages of weights, and activations that are computed again: against slow oracles, and off unless asked for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.classes import N_CLASSES
from common.recipes import DEMO, get_recipe
from common.train.checkpoints import load_network, save_checkpoint
from common.train.dataset import Normalisation
from common.train.hardware import Hardware
from common.train.networks import build_model
from common.train.optimizers import Average
from common.train.run import new_run
from common.train.step import train_step

CPU = Hardware(torch.device("cpu"))
SMALL = replace(DEMO, size_divisor=16, buffers=(8,), batch_size=4, finder="off")
DATA = SimpleNamespace(counts=np.ones(28), train=range(4), normalisation=Normalisation((0.5,) * 4, (0.3,) * 4))
IMAGES = torch.randint(0, 256, (4, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def trained(recipe, steps=3):
    """Return a run after a few steps, and its weights after each."""
    run, states = new_run(recipe, DATA, CPU, 0, 0), []
    for group in run.optimizer.param_groups:
        group["lr"] = group["top_lr"]
    for step in range(steps):
        train_step(run, IMAGES, torch.eye(4, 28), 4, 0.5, step)
        states.append({name: value.clone() for name, value in run.model.state_dict().items()})
    return run, states


def test_the_average_is_that_of_a_slow_loop():
    decay = 0.25
    run, states = trained(replace(SMALL, ema=decay))
    torch.manual_seed(0)
    expected = new_run(SMALL, DATA, CPU, 0, 0).model.state_dict()
    for step, state in enumerate(states):
        kept = min(decay, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25
        for name, value in state.items():
            mixed = kept * expected[name] + (1 - kept) * value
            expected[name] = mixed if value.is_floating_point() else value
    for name, value in run.average.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(run.trained.head[1].weight, run.model.head[1].weight)


def test_training_itself_is_as_without_an_average():
    averaged, plain = trained(replace(SMALL, ema=0.9))[0], trained(SMALL)[0]
    assert plain.average is None and plain.trained is plain.model and "average" not in plain.state()
    for mine, other in zip(averaged.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", ["best", "last"])
def test_averaged_weights_predict_from_either_checkpoint(tmp_path, kind):
    recipe = replace(SMALL, ema=0.5)
    run, _ = trained(recipe)
    state = run.network_state() if kind == "best" else {**run.state(), "made_from": {"parameters": {}, "inputs": {}}}
    save_checkpoint(tmp_path / f"{kind}.pt", state)
    model, _ = load_network(tmp_path / f"{kind}.pt", recipe, CPU)
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.average.state_dict()[name])


def test_a_resumed_average_goes_on_exactly():
    recipe = replace(SMALL, ema=0.5)
    whole, part, resumed = trained(recipe, 3)[0], trained(recipe, 2)[0], new_run(recipe, DATA, CPU, 1, 0)
    resumed.restore(part.state())
    for group in resumed.optimizer.param_groups:
        group["lr"] = group["top_lr"]
    train_step(resumed, IMAGES, torch.eye(4, 28), 4, 0.5, 2)
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name])


def test_an_average_never_has_gradients():
    average = Average(build_model(SMALL, N_CLASSES), 0.9)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("settings", [(), ("encoder=densenet121",), ("encoder=gapnet_pl", "pooling=own")], ids=str)
def test_computing_activations_again_changes_nothing(settings, micro_batch):
    recipe = replace(get_recipe("gapnet_pl"), size_divisor=8) if "pooling=own" in settings else SMALL
    recipe = replace(recipe, encoder="densenet121") if "encoder=densenet121" in settings else recipe
    hardware = replace(CPU, micro_batch=micro_batch)
    runs = [new_run(replace(recipe, checkpointing=again), DATA, hardware, 0, 0) for again in (False, True)]
    for run in runs:
        for step in range(2):
            train_step(run, IMAGES, torch.eye(4, 28), 4, 0.5, step)
    plain, again = (run.model.state_dict() for run in runs)
    for name, value in plain.items():  # running statistics too, which a second pass would move again
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


def test_fewer_activations_are_kept():
    kept = []
    for again in (False, True):
        model = build_model(get_recipe("resnet50", [f"checkpointing={again}"]), N_CLASSES).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x):
            model(torch.zeros(2, 4, 64, 64))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4
