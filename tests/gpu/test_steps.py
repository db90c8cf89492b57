"""Single steps on a GPU: as the CPU's, with the expected kernels and memory layout, without waiting, and when memory is full."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.recipes import GAPNET_PL, RECIPES, get_recipe
from common.train.checkpoints import load_checkpoint, save_checkpoint, snapshot
from common.train.hardware import PRECISIONS, Hardware, HardwareOptions, choose_hardware
from common.train.loop import all_batches, note_ranking, train_epoch
from common.train.lr_finder import lr_range_test
from common.train.predict import Fitting, predict_logits, views
from common.train.run import new_run
from common.train.step import train_step
from tests.gpu.helpers import RECIPES as SMALL_RECIPES
from tests.gpu.helpers import drawn, little_memory, noise, with_rates
from tests.slow.test_training import fold_data, same

CPU = Hardware(torch.device("cpu"))
# Encoder -> the first recipe that has it, at its real sizes.
ENCODERS = {
    recipe.encoder: recipe for recipe in reversed([*RECIPES.values(), get_recipe("demo", ["encoder=resnet18"])])
}
NOT_DETERMINISTIC = []  # warnings that are expected; none, or a run would not repeat its bits
ROOMY = replace(GAPNET_PL, size_divisor=2, batch_size=64, finder="record")  # half a GB of activations


@pytest.mark.gpus(1)
def test_the_precision_is_one_that_the_gpu_multiplies_itself(device):
    native = torch.cuda.get_device_capability(device)[0] >= 8
    for training_or_not in (True, False):
        chosen = choose_hardware(HardwareOptions(), training=training_or_not)
        assert chosen.autocast == (torch.bfloat16 if native else torch.float16) and chosen.device == device
    assert torch.cuda.get_device_name(device) in chosen.record()["device"] and chosen.workers > 0


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        (get_recipe("gapnet_pl", ["size_divisor=4", "dropouts=0,0"]), 1e-4),
        # ReLU, maximum pooling and BatchNorm amplify the last digits: two kinds of kernels of a CPU differ by up to a hundredth.
        (get_recipe("demo", ["dropouts=0"]), 3e-2),
        (get_recipe("demo", ["encoder=resnet18", "dropouts=0"]), 3e-2),
    ],
    ids=["gapnet_pl", "demo", "resnet18"],
)
def test_a_step_in_32_bits_is_the_cpus(hardware, recipe, tolerance):
    results, data = [], drawn(2, 32)
    for where in (hardware(), CPU):
        run = with_rates(new_run(recipe, data, where, 0, 0))
        losses, kept = train_step(run, *noise(16, recipe.crop, where.device), 16, 0.6, 0)
        gradient = torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])
        results.append((losses.cpu(), set(kept.tolist()), gradient.cpu(), snapshot(run.model.state_dict())))
    (losses, kept, gradient, weights), (cpu_losses, cpu_kept, cpu_gradient, cpu_weights) = results
    assert kept == cpu_kept and len(kept) == 10
    torch.testing.assert_close(losses, cpu_losses, rtol=1e-4, atol=1e-4)
    assert (gradient - cpu_gradient).norm() < tolerance * cpu_gradient.norm()
    for name, values in weights.items():
        torch.testing.assert_close(values, cpu_weights[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_each_encoder_keeps_channels_last_and_has_deterministic_kernels(hardware, encoder):
    where = hardware("auto")
    recipe = ENCODERS[encoder] if where.is_gpu else replace(ENCODERS[encoder], size_divisor=8)
    run = with_rates(new_run(replace(recipe, learning_rates=(1e-4,)), drawn(2, 32), where, 0, 0))
    run.model.train()
    formats = {}

    def note(name):
        return lambda module, inputs, output: formats.update(
            {name: output.is_contiguous(memory_format=torch.channels_last)}
        )

    for name, module in run.model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses, kept = train_step(run, *noise(2, recipe.crop, where.device), 2, 0.5, 0)
        note_ranking(run, torch.arange(2, device=where.device), losses, kept)
        losses = losses.tolist()
    told = sorted({str(warning.message).splitlines()[0] for warning in caught if "determinis" in str(warning.message)})
    assert told == NOT_DETERMINISTIC
    assert np.isfinite(losses).all() and len(kept) == 1
    assert formats and not [name for name, fine in formats.items() if not fine]
    weights = [p for p in run.model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert all(p.grad.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", SMALL_RECIPES)
def test_what_a_checkpoint_holds_of_an_optimizer_is_all_of_it(hardware, tmp_path, optimizer, precision):
    where, data = hardware(precision), drawn(8, 64)
    whole, resumed = (with_rates(new_run(SMALL_RECIPES[optimizer], data, where, fold, 0)) for fold in (0, 1))
    for step in range(3):
        train_step(whole, *noise(8, 64, where.device, step), 8, 0.5, step)
    save_checkpoint(tmp_path / "last.pt", {**snapshot(whole.state()), "made_from": {}})
    resumed.restore(load_checkpoint(tmp_path / "last.pt"))
    for run in (whole, resumed):
        for step in range(3, 5):
            train_step(run, *noise(8, 64, where.device, step), 8, 0.5, step)
    assert same(snapshot(resumed.state()), snapshot(whole.state()))
    tensors = [
        value for state in resumed.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    assert tensors and all(value.device == where.device for value in tensors)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", SMALL_RECIPES)
def test_steps_never_wait_for_the_gpu(hardware, tmp_path, optimizer, workers):
    """Twenty steps of an epoch in which torch raises an error for each operation that waits for the GPU."""
    data = fold_data(tmp_path, 16)
    rows = np.arange(200) % 16  # 25 batches
    data = replace(data, train=replace(data.train, ids=data.train.ids[rows], targets=data.train.targets[rows]))
    run = new_run(SMALL_RECIPES[optimizer], data, hardware("bf16", workers), 0, 0)
    run.epoch = 1  # after the hard sampler's warm-up
    react = torch.cuda.set_sync_debug_mode if run.hardware.is_gpu else lambda mode: None

    def watched(feed):
        for number, batch in enumerate(feed):
            if number in (2, 22):
                react("error" if number == 2 else "default")
            yield batch

    try:
        train_epoch(run, data, watched(all_batches(run, data)), "test", lambda: None)
    finally:
        react("default")
    assert run.step == 25 and np.isfinite(run.loss_sum)


# --- a full GPU --------------------------------------------------------------------------------------------


@pytest.mark.gpus(1)
def test_a_training_step_goes_on_in_parts_when_memory_is_full(hardware, device, capsys):
    where, data, batch = hardware(), drawn(2, 32), noise(64, ROOMY.crop, device)

    def step(micro_batch=None):
        run = with_rates(new_run(ROOMY, data, replace(where, micro_batch=micro_batch), 0, 0))
        return run, *train_step(run, *batch, 64, 0.6, 0)

    with little_memory(step):
        run, losses, kept = step()
    assert "out of memory with 64 images at once: continuing with 32" in capsys.readouterr().out
    assert 2 <= run.micro_batch <= 32
    calm, expected, expected_kept = step(run.micro_batch)
    assert set(kept.tolist()) == set(expected_kept.tolist())
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(run.model.parameters(), calm.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpus(1)
def test_the_finder_goes_on_in_parts_when_memory_is_full(hardware, capsys):
    where, data = hardware(), drawn(64, ROOMY.crop)

    def find():
        return lr_range_test(new_run(ROOMY, data, where, 0, 0), data, n_steps=3)

    with little_memory(find):
        rates, losses = find()
    assert "out of memory with 64 images at once: continuing with 32" in capsys.readouterr().out
    assert len(rates) == 3 and np.isfinite(losses).all()


@pytest.mark.gpus(1)
def test_prediction_goes_on_in_parts_when_memory_is_full(hardware):
    where, data = hardware(), drawn(64, 2 * ROOMY.crop)
    run, fitting, results = new_run(ROOMY, data, where, 0, 0), Fitting(), []

    def predict(fitting=None):
        results.append(
            predict_logits(run.model, data.normalisation, data.valid, where, views("dihedral"), 64, fitting=fitting)
        )

    with little_memory(predict):
        predict(fitting)
    assert 1 <= fitting.size <= 32
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpus(1)
def test_two_images_that_do_not_fit_end_in_one_message(hardware, device):
    run = new_run(ROOMY, drawn(2, 32), hardware(), 0, 0)
    batch = noise(4, 4 * ROOMY.crop, device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(UserError, match="two images do not fit into the GPU's memory; use a smaller crop"):
            train_step(run, *batch, 4, 1.0, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fast_kernels_give_the_deterministic_ones_losses(hardware, device, precision):
    batch, losses = noise(16, 96, device), []
    for fast in (True, False):
        run = with_rates(
            new_run(get_recipe("demo", ["dropouts=0"]), drawn(2, 32), hardware(precision, fast=fast), 0, 0)
        )
        losses.append(train_step(run, *batch, 16, 0.6, 0)[0])
        assert run.hardware.record()["kernels"] == ("fast" if fast else "deterministic")
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
