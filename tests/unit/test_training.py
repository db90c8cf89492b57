import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from common import training
from common.artifacts import write_text
from common.data import ImageSet
from common.errors import UserError
from common.images import write_planes
from common.inference import (Hardware, Normalisation, choose_hardware, mean_probabilities, predict_logits, views)
from common.models import build_model
from common.recipes import DEMO, Recipe
from common.training import (FoldData, Run, is_finished, load_checkpoint, load_network, lr_range_test, save_checkpoint,
                             save_lr_curve, train_fold)

CPU = Hardware(torch.device("cpu"), None, 0)
SMALL = replace(DEMO, image_size=512, crop_size=512, buffers=(64,), batch_size=8, cycle_epochs=2, max_cycles=2,
                min_cycle_gain=0.0)


def fold_data(folder, n, n_classes=28, size=64, crop=64, seed=0):
    """n images of random blocks, one class each, the same ones for training and validation."""
    rng = np.random.default_rng(seed)
    ids, targets = np.array([f"s{i}" for i in range(n)]), np.zeros((n, 28), dtype=bool)
    targets[np.arange(n), np.arange(n) % n_classes] = True
    for Id in ids:
        blocks = rng.integers(0, 256, (4, 8, 8), dtype=np.uint8)
        write_planes(folder / f"{Id}.tif", blocks.repeat(size // 8, axis=1).repeat(size // 8, axis=2))
    return FoldData(ImageSet(folder, ids, targets, crop), ImageSet(folder, ids, targets), targets.sum(axis=0),
                    Normalisation((0.5,) * 4, (0.3,) * 4))


def train(folder, data, recipe=SMALL, fold=0, seed=0):
    return train_fold(folder, data, recipe, CPU, fold, seed, {}, "test")


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if "seconds" not in str(key))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_it_learns_32_samples_by_heart(tmp_path):
    recipe = replace(SMALL, batch_size=32, cycle_epochs=25, max_cycles=4, dropouts=(0.2,))
    run = train(tmp_path / "run", fold_data(tmp_path / "images", 32), recipe)
    assert run.best_score > 0.95


class Killed(BaseException):
    pass


@pytest.mark.parametrize("steps_before_the_kill", [1, 5, 8])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, steps_before_the_kill):
    data = fold_data(tmp_path / "images", 24)
    train(tmp_path / "whole", data)
    step, done = training.train_step, []

    def dying_step(*arguments):
        if len(done) == steps_before_the_kill:
            raise Killed
        done.append(1)
        return step(*arguments)

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(training, "train_step", dying_step)
    with pytest.raises(Killed):
        train(tmp_path / "killed", data)
    monkeypatch.setattr(training, "train_step", step)
    train(tmp_path / "killed", data)
    for name in ("best.pt", "last.pt"):
        assert same(load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "killed" / name))
    assert (tmp_path / "whole" / "best.pt").read_bytes() == (tmp_path / "killed" / "best.pt").read_bytes()


@pytest.mark.parametrize("function", ["write_text", "save_checkpoint"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_killed_while_it_writes_it_ends_as_an_undisturbed_one(tmp_path, monkeypatch, function, call):
    data = fold_data(tmp_path / "images", 16)
    train(tmp_path / "whole", data)
    write, calls = getattr(training, function), []

    def dying_write(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(training, function, dying_write)
    with pytest.raises(Killed):
        train(tmp_path / "killed", data)
    monkeypatch.setattr(training, function, write)
    train(tmp_path / "killed", data)
    assert (tmp_path / "whole" / "best.pt").read_bytes() == (tmp_path / "killed" / "best.pt").read_bytes()
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 4


def test_folds_and_seeds_differ_from_the_start():
    def first(fold, seed):
        return training.new_run(SMALL, CPU, seed, fold).model.head[-1].weight
    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(1, 0)) and not torch.equal(first(0, 0), first(0, 1))


def test_the_log_has_one_json_line_an_epoch(tmp_path):
    train(tmp_path / "run", fold_data(tmp_path / "images", 16))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and [row["cycle"] for row in rows] == [1, 1, 2, 2]
    assert rows[0].keys() >= {"learning_rate", "train_loss", "valid_loss", "macro_f1", "seconds"}


def test_the_hard_sampler_waits_for_its_warm_up(tmp_path, monkeypatch):
    shares = []
    step = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *a: shares.append(a[4]) or step(*a))
    train(tmp_path / "run", fold_data(tmp_path / "images", 8), replace(SMALL, hard_warmup_epochs=2))
    assert shares == [1.0, 1.0, 0.7, 0.7]


def test_only_hard_samples_have_a_gradient():
    torch.manual_seed(0)
    run = training.new_run(replace(SMALL, dropouts=(0.0,)), CPU, 0, 0)
    run.model.eval()  # so that samples do not meet in the normalisation layers
    images, targets = torch.randn(4, 4, 64, 64, requires_grad=True), torch.eye(4, 28)
    training.train_step(run, images, targets, torch.ones(28), 0.5, SMALL, CPU)
    assert (images.grad.flatten(1).abs().sum(dim=1) > 0).sum() == 2


@pytest.mark.parametrize(("losses", "epoch", "finished"), [
    ([], 0, False),
    ([3.0], 1, False),
    ([3.0, 2.0], 2, False),  # the first cycle always counts as a gain
    ([3.0, 2.0, 2.5, 1.9], 4, False),  # 5 % better
    ([3.0, 2.0, 2.5, 1.99], 4, True),  # 0.5 % better
    ([3.0, 2.0, 1.0, 0.5, 0.3, 0.1], 6, True),  # the maximum
])
def test_cycles_end_when_one_gains_less_than_a_hundredth(losses, epoch, finished):
    recipe = replace(SMALL, cycle_epochs=2, max_cycles=3, min_cycle_gain=0.01)
    run = Run(None, None, None, epoch=epoch, history=[{"valid_loss": loss} for loss in losses])
    assert is_finished(run, recipe) == finished


def test_a_loss_that_is_not_finite_ends_training_with_advice(tmp_path):
    with pytest.raises(UserError, match="the loss is not finite in epoch .*; lower the learning rates"):
        train(tmp_path / "run", fold_data(tmp_path / "images", 16), replace(SMALL, learning_rates=(1e20, 1e20)))


def test_bf16_autocast_trains_on_the_cpu(tmp_path):
    hardware = choose_hardware("cpu", "bf16", None)
    assert hardware.autocast == torch.bfloat16
    run = train_fold(tmp_path / "run", fold_data(tmp_path / "images", 16), SMALL, hardware, 0, 0, {}, "test")
    assert np.isfinite(run.history[-1]["train_loss"])
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_device_that_is_not_there_is_an_error_with_the_cure():
    with pytest.raises(UserError, match="cannot be used .*; try --device cpu"):
        choose_hardware("cuda:99", "auto", None)


def test_one_sample_is_not_enough_to_train_on(tmp_path):
    folds = pd.DataFrame({"Id": ["a", "b"], "Target": ["0", "1"], "group": ["a", "b"], "fold": [0, 1], "copies": [1, 1]})
    with pytest.raises(UserError, match="fold 0 leaves 1 samples to train on; give more data or fewer folds"):
        training.load_fold(tmp_path, folds, 0, SMALL, 0)


def test_the_finder_saves_its_curve(tmp_path):
    rates, losses = lr_range_test(fold_data(tmp_path / "images", 16), SMALL, CPU, 0, 0, n_steps=20)
    suggestion = save_lr_curve(tmp_path, rates, losses)
    assert 1e-5 <= suggestion <= 10 and suggestion in rates
    assert (tmp_path / "lr_find.csv").read_text().startswith("learning_rate,loss,smoothed\n")
    assert (tmp_path / "lr_find.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_network_predicts_what_it_did(tmp_path):
    data = fold_data(tmp_path / "images", 16)
    run = train(tmp_path / "run", data, replace(SMALL, max_cycles=1))
    model, normalise = load_network(tmp_path / "run" / "last.pt", SMALL, CPU)
    for looks in (views("none"), views("dihedral")):
        expected = predict_logits(run.model, data.normalisation, data.valid, CPU, looks)
        torch.testing.assert_close(predict_logits(model, normalise, data.valid, CPU, looks), expected)


def test_predictions_hardly_depend_on_the_batch_size_and_views_are_averaged(tmp_path):
    data = fold_data(tmp_path / "images", 10)
    torch.manual_seed(0)
    model = build_model(SMALL, 28).to(memory_format=torch.channels_last)
    one = predict_logits(model, data.normalisation, data.valid, CPU, views("dihedral"), batch_size=1)
    many = predict_logits(model, data.normalisation, data.valid, CPU, views("dihedral"), batch_size=7)
    assert one.shape == (8, 10, 28)
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mean_probabilities(one), (1 / (1 + np.exp(-one.numpy()))).mean(axis=0), rtol=1e-5)


def test_crops_are_five_windows():
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    looks = views("none", crop=4)
    assert [look(images)[0, 0, 0, 0].item() for look in looks] == [0, 4, 32, 36, 18]
    assert all(look(images).shape == (1, 1, 4, 4) for look in looks)
    assert len(views("dihedral", crop=4)) == 40


def test_a_damaged_checkpoint_is_an_error_with_its_name(tmp_path):
    write_text(tmp_path / "last.pt", "no checkpoint")
    with pytest.raises(UserError, match="last.pt is not a checkpoint that can be read"):
        load_checkpoint(tmp_path / "last.pt")


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"model": Recipe})
    with pytest.raises(UserError, match="is not a checkpoint that can be read"):
        load_checkpoint(tmp_path / "last.pt")
