import copy
import json
import math
import os
import signal
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from common.artifacts.files import write_text
from common.data.images import write_planes
from common.errors import UserError
from common.process import stopping
from common.recipes import DEMO, GAPNET_PL, RECIPES, get_recipe, to_dict
from common.score.metrics import macro_f1
from common.score.thresholds import greedy_thresholds
from common.train import hardware, loop, lr_finder
from common.train import step as step_module
from common.train.checkpoints import load_checkpoint, load_network, save_checkpoint
from common.train.dataset import EpochBatches, ImageSet, Normalisation
from common.train.distributed import Team
from common.train.fold_data import FoldData, load_fold
from common.train.hardware import PRECISIONS, Hardware, HardwareOptions, choose_hardware
from common.train.loop import begin_fold, is_finished, train_fold
from common.train.losses import sample_losses
from common.train.lr_finder import lr_range_test, save_lr_curve
from common.train.networks import build_model
from common.train.optimizers import build_optimizer, param_groups
from common.train.predict import Fitting, mean_probabilities, predict_logits, views
from common.train.run import Run, new_run
from common.train.step import micro_batches, train_step
from tests.conftest import training_job

CPU = Hardware(torch.device("cpu"))
SMALL = replace(
    DEMO,
    image_size=512,
    crop_size=512,
    size_divisor=8,
    buffers=(64,),
    batch_size=8,
    cycle_epochs=2,
    max_cycles=2,
    min_cycle_gain=0.0,
    finder="off",
    evaluate_epochs=1,
)


OURS = replace(
    SMALL,
    optimizer="muon",
    schedule="one-cycle",
    learning_rates=(1e-3, 1e-3),
    evaluate_epochs=3,
    base_loss="bce",
    class_balance=0.5,
)


@pytest.fixture(autouse=True)
def write_after_every_epoch(monkeypatch):
    monkeypatch.setattr(loop, "EPOCH_SECONDS", 0)


def fold_data(folder, n, n_classes=28, size=64, crop=64, seed=0):
    """n images of random blocks, one class each, the same ones for training and validation."""
    rng = np.random.default_rng(seed)
    ids, targets = np.array([f"s{i}" for i in range(n)]), np.zeros((n, 28), dtype=bool)
    targets[np.arange(n), np.arange(n) % n_classes] = True
    for Id in ids:
        blocks = rng.integers(0, 256, (4, 8, 8), dtype=np.uint8)
        write_planes(folder / f"{Id}.tif", blocks.repeat(size // 8, axis=1).repeat(size // 8, axis=2))
    return FoldData(
        ImageSet(folder, ids, targets, crop),
        ImageSet(folder, ids, targets),
        targets.sum(axis=0),
        Normalisation((0.5,) * 4, (0.3,) * 4),
    )


def train(folder, data, recipe=SMALL, fold=0, seed=0, hardware=CPU, on_nan="stop"):
    job = training_job(folder, recipe, fold, seed, on_nan)
    return train_fold(begin_fold(job, data, hardware), job, data)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return a function that returns n images and the folder of a whole training on them; equal ones are cached."""

    @cache
    def trained(n, recipe=SMALL, on_nan="stop"):
        folder = tmp_path_factory.mktemp("undisturbed")
        data = fold_data(folder / "images", n)
        train(folder / "whole", data, recipe, on_nan=on_nan)
        return data, folder / "whole"

    return trained


UNSTEADY = ("seconds", "valid_seconds", "images_per_second", "memory_mib")  # these differ from run to run


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in UNSTEADY)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_it_learns_32_samples_by_heart(tmp_path):
    recipe = replace(SMALL, batch_size=32, cycle_epochs=25, max_cycles=4, dropouts=(0.0,), learning_rates=(5e-2, 5e-2))
    run = train(tmp_path / "run", fold_data(tmp_path / "images", 32), recipe)
    assert run.best_score > 0.95


class Killed(BaseException):
    pass


AVERAGED = replace(SMALL, ema=0.9, checkpointing=True)


@pytest.mark.parametrize("recipe", [SMALL, OURS, AVERAGED], ids=["paper", "ours", "averaged"])
@pytest.mark.parametrize("steps_before_the_kill", [1, 5, 8])
def test_a_killed_run_ends_as_an_undisturbed_one(undisturbed, tmp_path, monkeypatch, steps_before_the_kill, recipe):
    data, whole = undisturbed(24, recipe)
    step, done = loop.train_step, []

    def dying_step(*arguments):
        if len(done) == steps_before_the_kill:
            raise Killed
        done.append(1)
        return step(*arguments)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "train_step", dying_step)
    with pytest.raises(Killed):
        train(tmp_path / "killed", data, recipe)
    monkeypatch.setattr(loop, "train_step", step)
    train(tmp_path / "killed", data, recipe)
    for name in ("best.pt", "last.pt"):
        assert same(load_checkpoint(whole / name), load_checkpoint(tmp_path / "killed" / name))
    assert (whole / "best.pt").read_bytes() == (tmp_path / "killed" / "best.pt").read_bytes()


@pytest.mark.parametrize("function", ["write_text", "save_checkpoint"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_killed_while_it_writes_it_ends_as_an_undisturbed_one(undisturbed, tmp_path, monkeypatch, function, call):
    data, whole = undisturbed(16)
    write, calls = getattr(loop, function), []

    def dying_write(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(loop, function, dying_write)
    with pytest.raises(Killed):
        train(tmp_path / "killed", data)
    monkeypatch.setattr(loop, function, write)
    train(tmp_path / "killed", data)
    assert (whole / "best.pt").read_bytes() == (tmp_path / "killed" / "best.pt").read_bytes()
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 4


def test_folds_and_seeds_differ_from_the_start(tmp_path):
    data = fold_data(tmp_path, 4)

    def first(fold, seed):
        return new_run(SMALL, data, CPU, fold, seed).model.head[-1].weight

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(1, 0)) and not torch.equal(first(0, 0), first(0, 1))


def test_the_log_has_one_json_line_an_epoch(undisturbed):
    rows = [json.loads(line) for line in (undisturbed(16)[1] / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and [row["cycle"] for row in rows] == [1, 1, 2, 2]
    assert rows[0].keys() >= {"learning_rate", "train_loss", "valid_loss", "macro_f1", "seconds"}
    for row in rows:
        assert row["macro_f1"] == pytest.approx(np.mean(row["class_f1"]), abs=1e-4) and len(row["class_f1"]) == 28
        assert 0 <= row["macro_f1_thresholds"] <= 1 and row["images_per_second"] > 0 and row["memory_mib"] > 50


def test_the_score_with_thresholds_uses_those_of_other_samples():
    targets = np.zeros((50, 28), dtype=bool)
    targets[::2, 3] = True
    probs = np.where(targets, 0.3, 0.2)  # right with a threshold between, never at 0.5
    assert loop.score_with_thresholds(targets, probs) == pytest.approx(1 / 28)
    chance = np.random.default_rng(0).random((50, 28))
    labels = np.random.default_rng(1).random((50, 28)) < 0.3
    in_sample = macro_f1(labels, chance >= greedy_thresholds(labels, chance))
    assert loop.score_with_thresholds(labels, chance) < in_sample - 0.05
    assert loop.score_with_thresholds(labels[:1], chance[:1]) == macro_f1(labels[:1], chance[:1] >= 0.5)


def test_the_hard_sampler_waits_for_its_warm_up(tmp_path, monkeypatch):
    shares = []
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: shares.append(a[4]) or step(*a))
    train(tmp_path / "run", fold_data(tmp_path / "images", 8), replace(SMALL, hard_warmup_epochs=2))
    assert shares == [1.0, 1.0, 0.7, 0.7]


def batch(n, size=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 4, size, size), dtype=torch.uint8, generator=rng), torch.eye(n, 28)


def gradients(run):
    return torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])


def plain(data, dropout=0.0, **changes):
    """A run of GapNet-PL, which has no BatchNorm, without regularisation."""
    recipe = replace(GAPNET_PL, size_divisor=8, dropouts=(dropout, dropout), l1=0.0, clip_norm=0.0, **changes)
    return new_run(recipe, data, CPU, 0, 0)


def test_only_the_hardest_samples_are_learnt_from(tmp_path):
    run = plain(fold_data(tmp_path, 4))
    images, targets = batch(8)
    losses, kept = train_step(run, images, targets, 8, 0.5, 0)
    mine = gradients(run).clone()
    run = plain(fold_data(tmp_path, 4))
    expected = sample_losses(run.model(run.normalise(images, CPU.device)), targets, run.class_weights, run.recipe)
    assert kept.tolist() == sorted(range(8), key=lambda i: -expected[i])[:4]
    torch.testing.assert_close(losses, expected)
    expected[kept].mean().backward()
    torch.testing.assert_close(mine, gradients(run))


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("micro_batch", [2, 3, 7])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path, share, micro_batch):
    results = []
    for size in (None, micro_batch):
        run = plain(fold_data(tmp_path, 4))
        run.micro_batch = size
        losses, kept = train_step(run, *batch(10), 10, share, 0)
        results.append((losses, kept, gradients(run)))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_ranking_in_parts_uses_the_same_dropout_and_leaves_no_trace(tmp_path):
    data = fold_data(tmp_path, 4)
    run = new_run(replace(SMALL, dropouts=(0.5,)), data, CPU, 0, 0)
    run.micro_batch = 4
    seen = []
    run.network.register_forward_hook(lambda module, inputs, logits: seen.append(logits.detach()))
    train_step(run, *batch(8), 8, 0.5, 0)
    ranking, training_pass = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert torch.equal(ranking, training_pass)
    counted = new_run(replace(SMALL, dropouts=(0.5,)), data, CPU, 0, 0)
    counted.micro_batch = 4
    train_step(counted, *batch(8), 8, 1.0, 0)  # without a ranking pass
    for (name, buffer), other in zip(run.model.named_buffers(), counted.model.buffers(), strict=True):
        assert name.endswith("num_batches_tracked") or torch.equal(buffer, other)


@pytest.mark.parametrize(
    ("n", "most", "sizes"),
    [(8, None, [8]), (8, 4, [4, 4]), (7, 4, [3, 4]), (3, 2, [3]), (1, 2, [1]), (9, 2, [2, 2, 2, 3])],
)
def test_no_part_has_one_image(n, most, sizes):
    assert [part.stop - part.start for part in micro_batches(n, most)] == sizes


@pytest.mark.parametrize(("batch", "processes", "most"), [(74, 4, 18), (7, 2, 3), (9, 2, 1), (8, 3, 2)])
def test_all_processes_have_as_many_parts_of_a_batch(batch, processes, most):
    team = [Team(rank, processes).part(batch) for rank in range(processes)]
    parts = [micro_batches(part.stop - part.start, most, batch, processes) for part in team]
    assert len({len(own) for own in parts}) == 1
    assert all(part.stop - part.start > 1 for own in parts for part in own)


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tmp_path, capsys, monkeypatch):
    data = fold_data(tmp_path, 4)
    run, calm = plain(data), plain(data)
    forward = run.network.forward

    def small_gpu(images):
        if len(images) > 3:
            raise torch.cuda.OutOfMemoryError
        return forward(images)

    monkeypatch.setattr(run.network, "forward", small_gpu)
    for step in range(2):
        train_step(run, *batch(12), 12, 0.5, step)
        train_step(calm, *batch(12), 12, 0.5, step)
    assert capsys.readouterr().out.splitlines() == [
        "out of memory with 12 images at once: continuing with 6; the batch keeps its size",
        "out of memory with 6 images at once: continuing with 3; the batch keeps its size",
    ]
    assert run.micro_batch == run.state()["micro_batch"] == 3
    for mine, expected in zip(run.model.parameters(), calm.model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "text", ["cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_other_words_for_a_full_gpu_halve_the_micro_batch_too(tmp_path, monkeypatch, text):
    run = plain(fold_data(tmp_path, 4))
    forward = run.network.forward

    def small_gpu(images):
        if len(images) > 3:
            raise RuntimeError(text)
        return forward(images)

    monkeypatch.setattr(run.network, "forward", small_gpu)
    train_step(run, *batch(6), 6, 0.5, 0)
    assert run.micro_batch == 3


def test_an_optimizer_that_runs_out_of_memory_has_done_its_step_once_at_most(tmp_path, monkeypatch):
    run, calls = plain(fold_data(tmp_path, 4)), []

    def step():
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.optimizer, "step", step)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train_step(run, *batch(8), 8, 1.0, 0)
    assert calls == [1] and run.micro_batch is None


def test_a_micro_batch_that_is_asked_for_wins_over_the_one_that_was_saved(tmp_path):
    data = fold_data(tmp_path / "images", 16)
    saved = new_run(SMALL, data, replace(CPU, micro_batch=4), 0, 0)
    for asked, expected in ((None, 4), (2, 2)):
        run = new_run(SMALL, data, replace(CPU, micro_batch=asked), 0, 0)
        run.restore(copy.deepcopy(saved.state()))
        assert run.micro_batch == expected


def test_prediction_remembers_how_many_images_fitted(tmp_path, monkeypatch):
    data, sizes = fold_data(tmp_path, 12), []
    model, fitting = build_model(SMALL, 28), Fitting()
    forward = model.forward

    def small_gpu(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise RuntimeError("CUDA error: out of memory")
        return forward(images)

    expected = predict_logits(model, data.normalisation, data.valid, CPU, views("none"), 6)
    monkeypatch.setattr(model, "forward", small_gpu)
    for _ in range(2):
        found = predict_logits(model, data.normalisation, data.valid, CPU, views("none"), 6, fitting=fitting)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sizes == [6, *[3] * 8] and fitting.size == 3


@pytest.mark.parametrize(("first", "then"), [("bf16", "fp16"), ("fp16", "fp32"), ("fp32", "fp16"), ("fp16", "fp16")])
def test_a_run_resumes_in_another_precision(tmp_path, monkeypatch, first, then):
    data, epoch = fold_data(tmp_path / "images", 16), loop.train_epoch

    def dies(run, *arguments):
        if run.epoch == 1:
            raise Killed
        epoch(run, *arguments)

    monkeypatch.setattr(loop, "train_epoch", dies)
    with pytest.raises(Killed):
        train(tmp_path / "run", data, hardware=choose_hardware(HardwareOptions("cpu", first)))
    monkeypatch.setattr(loop, "train_epoch", epoch)
    run = train(tmp_path / "run", data, hardware=choose_hardware(HardwareOptions("cpu", then)))
    assert (
        len(run.history) == 4
        and run.scaler.is_enabled() == (then == "fp16")
        and np.isfinite(run.history[-1]["valid_loss"])
    )
    assert [row["hardware"].split(", ")[2] for row in run.history] == [
        str(PRECISIONS[p] or torch.float32)[6:] for p in (first, *[then] * 3)
    ]


def overflow(monkeypatch, steps):
    """Let the activations of the given training steps overflow, as they may in float16."""
    real, calls = sample_losses, []

    def losses(logits, targets, weights, recipe):
        calls.append(1)
        factor = math.inf if logits.requires_grad and len(calls) - 1 in steps else 1.0
        return real(logits * factor, targets, weights, recipe)

    monkeypatch.setattr(step_module, "sample_losses", losses)
    monkeypatch.setattr(loop, "sample_losses", losses)


def test_a_batch_that_overflows_in_float16_is_skipped_and_leaves_no_trace(tmp_path, monkeypatch):
    run = new_run(SMALL, fold_data(tmp_path, 8), choose_hardware(HardwareOptions("cpu", "fp16")), 0, 0)
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    train_step(run, *batch(8), 8, 0.5, 0)
    before = copy.deepcopy(run.model.state_dict())
    forward = run.network.forward
    monkeypatch.setattr(run.network, "forward", lambda images: forward(images * math.inf))
    losses, _ = train_step(run, *batch(8), 8, 0.5, 1)
    assert not losses.isfinite().any() and same(before, run.model.state_dict())
    monkeypatch.setattr(run.network, "forward", forward)
    train_step(run, *batch(8), 8, 0.5, 2)
    assert not same(before, run.model.state_dict()) and loop.finite_weights(run).all()


def test_single_overflows_are_counted_and_whole_epochs_of_them_end_training(tmp_path, monkeypatch):
    data, half = fold_data(tmp_path / "images", 24), choose_hardware(HardwareOptions("cpu", "fp16"))
    overflow(monkeypatch, {1, 5})  # of 3 steps and a validation per epoch: the second step of two epochs
    run = train(tmp_path / "run", data, hardware=half)
    assert [row.get("skipped") for row in run.history] == [1, 1, None, None]
    assert all(np.isfinite(row["train_loss"]) for row in run.history)
    assert pd.read_csv(tmp_path / "run" / "hard_samples.csv")["mean_loss"].notna().all()
    overflow(monkeypatch, set(range(3)))
    with pytest.raises(UserError, match="the loss is not finite in epoch 1, batch 1 of 3"):
        train(tmp_path / "bad", data, hardware=half)
    overflow(monkeypatch, {1})
    with pytest.raises(UserError, match="the loss is not finite in epoch 1, batch 2 of 3"):
        train(tmp_path / "full", data)  # in 32 bit none is tolerated


def test_one_loader_serves_a_whole_training_and_makes_the_same_batches(tmp_path, monkeypatch):
    data, calls, real = fold_data(tmp_path / "images", 24), [], loop.loader
    monkeypatch.setattr(loop, "loader", lambda *arguments: calls.append(1) or real(*arguments))
    train(tmp_path / "alone", data)
    train(tmp_path / "fed", data, hardware=replace(CPU, workers=2))
    assert len(calls) == 2
    assert (tmp_path / "alone" / "best.pt").read_bytes() == (tmp_path / "fed" / "best.pt").read_bytes()


def test_two_images_that_do_not_fit_end_with_a_cure(tmp_path, monkeypatch):
    run = plain(fold_data(tmp_path, 4))

    def no_gpu(images):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(run.network, "forward", no_gpu)
    with pytest.raises(UserError, match="out of memory with two images at once; use a smaller crop"):
        train_step(run, *batch(4), 4, 1.0, 0)


def test_l1_and_the_limit_on_the_gradient_are_applied(tmp_path):
    free, bound = plain(fold_data(tmp_path, 4)), plain(fold_data(tmp_path, 4))
    bound.recipe = replace(bound.recipe, l1=0.1)
    weights = torch.cat([p.detach().flatten().clone() for p in free.model.parameters()])
    for run in (free, bound):
        train_step(run, *batch(4), 4, 1.0, 0)
    torch.testing.assert_close(gradients(bound), gradients(free) + 0.1 * weights.sign(), rtol=1e-4, atol=1e-5)
    bound.recipe = replace(bound.recipe, l1=0.0, clip_norm=1e-3)
    train_step(bound, *batch(4), 4, 1.0, 0)
    assert gradients(bound).norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [1, 1, 1, 1]), ("plateau", [1, 1, 0.5, 0.25])])
def test_other_schedules(tmp_path, monkeypatch, schedule, expected):
    losses = [1.0, 2.0, 2.0, 0.5]
    monkeypatch.setattr(loop, "evaluate", lambda run, data, feed: {"valid_loss": losses[run.epoch], "macro_f1": 0.1})
    run = train(tmp_path / "run", fold_data(tmp_path / "images", 8), replace(SMALL, schedule=schedule, patience=0))
    assert [row["learning_rate"] / 2e-2 for row in run.history] == pytest.approx(expected)


def test_the_hard_samplers_choices_are_told(tmp_path):
    recipe = replace(SMALL, hard_share=0.5, hard_warmup_epochs=1)
    train(tmp_path / "run", fold_data(tmp_path / "images", 16), recipe)
    mix = pd.read_csv(tmp_path / "run" / "hard_classes.csv")
    assert sorted(mix["epoch"].unique()) == [2, 3, 4]  # the first one ranks nothing
    np.testing.assert_allclose(mix.groupby("epoch")[["share_of_ranked", "share_of_kept"]].sum(), 1, atol=0.01)
    assert (mix.groupby("epoch")["kept"].sum() == 8).all()
    samples = pd.read_csv(tmp_path / "run" / "hard_samples.csv")
    assert len(samples) == 16 and (samples["ranked"] == 3).all() and samples["kept"].sum() == 3 * 8
    assert samples["share_kept"].is_monotonic_decreasing


def test_samples_that_are_drawn_twice_are_counted_twice(tmp_path):
    data = fold_data(tmp_path / "images", 16)
    data.train.targets[:] = np.arange(28) == 0
    data.train.targets[3] = np.arange(28) == 1  # one sample against fifteen: 16 * 15 / 30 draws of it per epoch
    train(tmp_path / "run", data, replace(SMALL, batch_size=16, hard_warmup_epochs=0, class_balance=1.0))
    samples = pd.read_csv(tmp_path / "run" / "hard_samples.csv").set_index("Id")
    assert samples["ranked"].sum() == 4 * 16 and samples.loc["s3", "ranked"] == 4 * 8


def test_a_wrong_label_is_kept_most_often(tmp_path):
    data = fold_data(tmp_path / "images", 32, n_classes=2)
    blocks = [np.full((4, 64, 64), 40 + 120 * (i % 2), np.uint8) for i in range(32)]  # class 1 is brighter
    for Id, block in zip(data.train.ids, blocks, strict=True):
        write_planes(tmp_path / "images" / f"{Id}.tif", block)
    data.train.targets[5] = data.train.targets[4]  # a bright one with the other's label
    train(
        tmp_path / "run",
        data,
        replace(SMALL, batch_size=16, hard_share=0.5, cycle_epochs=20, learning_rates=(5e-3, 5e-3)),
    )
    samples = pd.read_csv(tmp_path / "run" / "hard_samples.csv")
    assert samples["Id"][0] == "s5" and samples["mean_loss"][0] > 1.5 * samples["mean_loss"][1]


@pytest.mark.parametrize(
    ("losses", "epoch", "finished"),
    [
        ([], 0, False),
        ([3.0], 1, False),
        ([3.0, 2.0], 2, False),  # the first cycle always counts as a gain
        ([3.0, 2.0, 2.5, 1.9], 4, False),  # 5 % better
        ([3.0, 2.0, 2.5, 1.99], 4, True),  # 0.5 % better
        ([3.0, 2.0, 1.0, 0.5, 0.3, 0.1], 6, True),  # the maximum
    ],
)
def test_cycles_end_when_one_gains_less_than_a_hundredth(losses, epoch, finished):
    recipe = replace(SMALL, cycle_epochs=2, max_cycles=3, min_cycle_gain=0.01)
    run = Run(recipe, *[None] * 10, epoch=epoch, history=[{"valid_loss": loss} for loss in losses])
    assert is_finished(run) == finished


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("demo")])
def test_every_network_trains_goes_on_from_a_checkpoint_and_predicts(tmp_path, name):
    data = fold_data(tmp_path, 4)
    recipe = replace(get_recipe(f"{name}-quick"), batch_size=2)
    whole, resumed = new_run(recipe, data, CPU, 0, 0), new_run(recipe, data, CPU, 1, 0)
    for run in (whole, resumed):
        for group in run.optimizer.param_groups:
            group["lr"] = group["top_lr"]
    assert train_step(whole, *batch(2), 2, 0.5, 0)[0].isfinite().all()
    resumed.restore(copy.deepcopy(whole.state()))
    for run in (whole, resumed):
        train_step(run, *batch(2), 2, 0.5, 1)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    # Running statistics of two steps are useless: deep networks overflow with them.
    assert predict_logits(whole.model, data.normalisation, data.valid, CPU, views("none")).shape == (1, 4, 28)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda saved: saved.pop("ranking"), "it has no 'ranking'"),
        (lambda saved: saved.update(ranking=torch.zeros(2, 3, 3)), "its ranking has the shape"),
        (lambda saved: saved["model"].pop("head.0.weight"), "Missing key"),
        (lambda saved: saved["model"].update({"head.0.weight": torch.zeros(3)}), "size mismatch"),
        (
            lambda saved: saved["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(5)),
            "its optimizer belongs to another network",
        ),
        (lambda saved: saved["optimizer"]["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_a_checkpoint_with_parts_missing_or_of_other_shapes_is_one_message(tmp_path, change, reason):
    data = fold_data(tmp_path / "images", 8)
    run = new_run(SMALL, data, CPU, 0, 0)
    train_step(run, *batch(4), 4, 1.0, 0)
    saved = copy.deepcopy(run.state())
    change(saved)
    save_checkpoint(tmp_path / "last.pt", saved)
    with pytest.raises(UserError, match=reason):
        begin_fold(training_job(tmp_path, SMALL), data, CPU)


def test_a_loss_that_is_not_finite_ends_training_with_advice(tmp_path):
    with pytest.raises(UserError, match="the loss is not finite in epoch .* Lower the learning rates"):
        train(tmp_path / "run", fold_data(tmp_path / "images", 16), replace(SMALL, learning_rates=(1e20, 1e20)))


STEADY = replace(SMALL, schedule="constant")  # at 0.02, 3 batches per epoch from 24 samples


def poison(monkeypatch, steps, highest):
    """Let the weights become NaN at the given steps while the learning rate is above `highest`."""
    real = loop.train_step

    def step(run, images, targets, n, share, step):
        result = real(run, images, targets, n, share, step)
        if step in steps and run.optimizer.param_groups[-1]["lr"] > highest:
            next(run.model.parameters()).data.fill_(float("nan"))
        return result

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize(
    ("last", "place", "file"),
    [
        (3, "epoch 2, batch 2 of 3", True),  # NaN weights after the first batch show in the second one's losses
        (5, "epoch 2, batch 3 of 3", True),  # the losses are still finite, the weights are not
    ],
)
def test_the_ids_of_the_first_batch_that_is_not_finite_are_saved(tmp_path, monkeypatch, last, place, file):
    data = fold_data(tmp_path / "images", 24)
    poison(monkeypatch, {last}, 0)
    with pytest.raises(UserError) as stop:
        train(tmp_path / "run", data, STEADY)
    path = tmp_path / "run" / "bad_batch.csv"
    message = str(stop.value)
    assert message.startswith(f"test fold 0: the loss is not finite in {place}; ") and f" {path}. " in message
    assert all(cure in message for cure in ("--set learning_rates=...", "--force", "--on-nan back"))
    batch = int(place.split()[3]) - 1
    assert list(pd.read_csv(path)["Id"]) == list(data.train.ids[EpochBatches(24, 8, 0, 1).rows(batch)])
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1  # the last good state still exists


@pytest.mark.parametrize("killed_after", [None, 3, 4, 6, 8, 10])
def test_it_goes_back_with_half_the_learning_rates_and_ends_the_same_when_killed(
    undisturbed, tmp_path, monkeypatch, killed_after
):
    poison(monkeypatch, {4, 7}, 0.006)  # twice in a row in the second epoch; not at a quarter of the rate
    data, whole = undisturbed(24, STEADY, "back")
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in log] == pytest.approx([2e-2, 5e-3, 5e-3, 5e-3])
    assert [row.get("returns", []) for row in log] == [[], *[["epoch 2, batch 3 of 3"] * 2] * 3]
    assert load_checkpoint(whole / "last.pt")["returns"] == ["epoch 2, batch 3 of 3"] * 2
    if killed_after is None:
        return
    step, done = loop.train_step, []

    def dying_step(*arguments):
        done.append(1)
        if len(done) > killed_after:
            raise Killed
        return step(*arguments)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "train_step", dying_step)
    with pytest.raises(Killed):
        train(tmp_path / "killed", data, STEADY, on_nan="back")
    monkeypatch.setattr(loop, "train_step", step)
    train(tmp_path / "killed", data, STEADY, on_nan="back")
    for name in ("best.pt", "last.pt"):
        assert same(load_checkpoint(whole / name), load_checkpoint(tmp_path / "killed" / name))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1500, -1])
def test_one_weight_that_is_not_finite_is_found_wherever_it_is(bad, place):
    weights = [
        torch.nn.Parameter(values) for values in (torch.randn(3001), torch.full((40, 8, 3, 3), 3e38), torch.zeros(1))
    ]
    run = SimpleNamespace(model=torch.nn.ParameterList(weights))
    assert loop.finite_weights(run).tolist() == [True, True, True]
    with torch.no_grad():
        weights[1].view(-1)[place] = bad
    assert loop.finite_weights(run).tolist() == [True, False, True]


def test_it_goes_back_three_times_at_most(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1}, 0)
    with pytest.raises(UserError, match="after it went back 3 times; .*bad_batch.csv. Lower the learning rates"):
        train(tmp_path / "run", fold_data(tmp_path / "images", 24), STEADY, on_nan="back")
    out = capsys.readouterr().out
    assert [
        f"start of epoch 1 with {factor} of the learning rates" in out for factor in ("0.5", "0.25", "0.125", "0.0625")
    ] == [True, True, True, False]


def test_a_validation_loss_that_is_not_finite_counts_too(tmp_path, monkeypatch):
    real, calls = loop.predict_logits, []

    def predict(*arguments, **more):
        logits = real(*arguments, **more).clone()
        calls.append(1)
        if len(calls) == 2:
            logits[0, 5] = float("nan")
        return logits

    monkeypatch.setattr(loop, "predict_logits", predict)
    run = train(tmp_path / "run", fold_data(tmp_path / "images", 8), STEADY, on_nan="back")
    assert run.returns == ["the validation of epoch 2"] and len(run.valid_losses) == 4
    assert list(pd.read_csv(tmp_path / "run" / "bad_batch.csv")["Id"]) == ["s5"]


def test_a_loss_that_is_not_finite_from_the_first_batch_passes_the_finder(tmp_path, monkeypatch, capsys):
    data = fold_data(tmp_path / "images", 24)
    monkeypatch.setattr(step_module, "sample_losses", lambda logits, *_: logits.sum(dim=1) * float("nan"))
    with pytest.raises(UserError, match="the loss is not finite in epoch 1, batch 1 of 3; .*bad_batch.csv"):
        train(tmp_path / "run", data, replace(SMALL, finder="record"))
    assert "the loss is not finite from the very first batch" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "run" / "bad_batch.csv")) == 8


def test_losses_are_looked_at_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECK_STEPS", 2)
    poison(monkeypatch, {2}, 0)
    with pytest.raises(UserError, match="not finite in epoch 1, batch 4 of 6"):
        train(tmp_path / "run", fold_data(tmp_path / "images", 48), STEADY)


@pytest.mark.parametrize("point", ["step", "evaluate"])
@pytest.mark.parametrize("on_nan", ["stop", "back"])
def test_sigterm_saves_a_checkpoint_at_the_next_step_and_the_end_is_the_same(
    undisturbed, tmp_path, monkeypatch, capsys, point, on_nan
):
    data, whole = undisturbed(24)
    stopping.listen()
    name = {"step": "train_step", "evaluate": "evaluate"}[point]
    real, calls = getattr(loop, name), []

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(loop, name, terminated)
    with pytest.raises(stopping.Stopped):
        train(tmp_path / "stopped", data, on_nan=on_nan)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    place = {"step": "epoch 1 after batch 2", "evaluate": "epoch 2 after batch 3"}[point]
    assert f"test fold 0: saved in {place}\n" in capsys.readouterr().out and len(calls) == 2
    stopping.STATE.asked = False
    train(tmp_path / "stopped", data, on_nan=on_nan)
    for name in ("best.pt", "last.pt"):
        assert same(load_checkpoint(whole / name), load_checkpoint(tmp_path / "stopped" / name))


def test_bf16_autocast_trains_on_the_cpu(tmp_path):
    hardware = choose_hardware(HardwareOptions("cpu", "bf16"))
    assert hardware.autocast == torch.bfloat16
    run = train(tmp_path / "run", fold_data(tmp_path / "images", 16), hardware=hardware)
    assert np.isfinite(run.history[-1]["train_loss"])
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_device_that_is_not_there_is_an_error_with_the_cure():
    with pytest.raises(UserError, match="cannot be used .*; try --device cpu"):
        choose_hardware(HardwareOptions("cuda:99"))


def test_one_sample_is_not_enough_to_train_on(tmp_path):
    folds = pd.DataFrame(
        {"Id": ["a", "b"], "Target": ["0", "1"], "group": ["a", "b"], "fold": [0, 1], "copies": [1, 1]}
    )
    with pytest.raises(UserError, match="fold 0 leaves 1 samples to train on; give more data or fewer folds"):
        load_fold(tmp_path, folds, 0, SMALL, 0)


def test_the_finder_saves_its_curve(tmp_path):
    data = fold_data(tmp_path / "images", 16)
    rates, losses = lr_range_test(new_run(SMALL, data, CPU, 0, 0), data, n_steps=20)
    suggestion, steepest = save_lr_curve(tmp_path, rates, losses)
    assert 1e-5 <= steepest <= suggestion <= 10 and {suggestion, steepest} <= set(rates)
    assert (tmp_path / "lr_find.csv").read_text().startswith("learning_rate,loss,smoothed\n")
    assert (tmp_path / "lr_find.png").read_bytes().startswith(b"\x89PNG")


def test_the_finders_rates_are_those_of_the_last_layers_and_the_others_keep_their_ratio(tmp_path, monkeypatch):
    used, real = [], train_step
    monkeypatch.setattr(lr_finder, "train_step", lambda run, *rest: used.append(rates_of(run)) or real(run, *rest))
    recipe = replace(SMALL, learning_rates=(1e-3, 4e-3))
    data = fold_data(tmp_path, 8)
    rates, _ = lr_range_test(new_run(recipe, data, CPU, 0, 0), data, n_steps=3)
    assert used == [pytest.approx([rate / 4, rate]) for rate in rates]


def rates_of(run):
    return sorted({group["lr"] for group in run.optimizer.param_groups})


def test_a_saved_network_predicts_what_it_did(tmp_path):
    data = fold_data(tmp_path / "images", 16)
    recipe = replace(SMALL, max_cycles=1)
    run = train(tmp_path / "run", data, recipe)
    model, normalise = load_network(tmp_path / "run" / "last.pt", recipe, CPU)
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


def test_images_of_several_sizes_are_predicted_in_their_places(tmp_path):
    sides = np.array([64, 96, 64, 96, 96])
    rng = np.random.default_rng(0)
    ids = np.array([f"s{i}" for i in range(5)])
    for Id, side in zip(ids, sides, strict=True):
        write_planes(tmp_path / f"{Id}.tif", rng.integers(0, 256, (4, side, side), dtype=np.uint8))
    torch.manual_seed(0)
    model, normalise = build_model(SMALL, 28), Normalisation((0.5,) * 4, (0.3,) * 4)
    targets = np.zeros((5, 28), dtype=bool)
    together = predict_logits(
        model, normalise, ImageSet(tmp_path, ids, targets, sides=sides), CPU, views("dihedral"), 2
    )
    for i in range(5):
        alone = predict_logits(
            model, normalise, ImageSet(tmp_path, ids[i : i + 1], targets[:1]), CPU, views("dihedral")
        )
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_crops_are_five_windows():
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    looks = views("none", crop=4)
    assert [look(images)[0, 0, 0, 0].item() for look in looks] == [0, 4, 32, 36, 18]
    assert all(look(images).shape == (1, 1, 4, 4) for look in looks)
    assert len(views("dihedral", crop=4)) == 40


def test_a_damaged_checkpoint_is_an_error_with_its_name(tmp_path):
    write_text(tmp_path / "last.pt", "no checkpoint")
    with pytest.raises(UserError, match="last.pt is not a readable checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "checkpoint of format 1, .* reads format 4; train the fold again with --force"),
        ({"format": 5}, "checkpoint of format 5, .* reads format 4"),
        ({"classes": ["a", "b"]}, "was trained for 2 classes, expected the 28 of this project"),
        (
            {"recipe": to_dict(replace(SMALL, buffers=(32,), alpha=0.5))},
            r"was trained with another recipe: buffers \[32\], expected \[64\]; alpha 0.5, expected 0.9",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_both_named(tmp_path, change, message):
    run = new_run(SMALL, fold_data(tmp_path, 4), CPU, 0, 0)
    save_checkpoint(tmp_path / "last.pt", {**run.state(), **change})
    with pytest.raises(UserError, match=message):
        load_network(tmp_path / "last.pt", SMALL, CPU)
    with pytest.raises(UserError, match=message):
        begin_fold(training_job(tmp_path, SMALL), fold_data(tmp_path, 4), CPU)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_only_are_decayed_and_every_parameter_is_held_once(optimizer):
    recipe = replace(OURS, optimizer=optimizer, weight_decay=0.1)
    model = build_model(recipe, 28)
    groups = build_optimizer(recipe, param_groups(model, (1e-3, 2e-3))).param_groups
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert all(
        group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0) for group in groups for parameter in group["params"]
    )
    assert {group["top_lr"] for group in groups} == {1e-3, 2e-3}


def test_it_is_evaluated_as_often_as_the_recipe_says(tmp_path):
    recipe = replace(SMALL, cycle_epochs=5, max_cycles=2, evaluate_epochs=2)
    run = train(tmp_path / "run", fold_data(tmp_path / "images", 16), recipe)
    assert [row["epoch"] for row in run.history if "valid_loss" in row] == [2, 4, 5, 7, 9, 10]


def test_a_write_that_fails_ends_the_training(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path / "run", fold_data(tmp_path / "images", 16))


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (({"avx512_bf16"}, "AMD EPYC 9B14"), torch.bfloat16),
        (({"avx512_bf16"}, "Intel Xeon"), None),
        (({"avx512_bf16", "amx_bf16"}, "Intel Xeon"), torch.bfloat16),
        ((set(), ""), None),
    ],
)
def test_a_cpu_trains_in_bf16_where_that_is_faster_and_predicts_in_32_bit(monkeypatch, cpu, expected):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: cpu)
    assert choose_hardware(HardwareOptions("cpu")).autocast == expected
    assert choose_hardware(HardwareOptions("cpu"), training=False).autocast is None


def test_the_memory_format_changes_rounding_only(tmp_path):
    data = fold_data(tmp_path / "images", 16)
    usual = train(tmp_path / "usual", data)
    other = train(
        tmp_path / "other",
        data,
        hardware=choose_hardware(HardwareOptions("cpu", "fp32", 0, memory_format="contiguous")),
    )
    assert all(value.is_contiguous() for value in other.model.state_dict().values())
    for before, after in zip(usual.history[:2], other.history[:2], strict=True):
        assert after["valid_loss"] == pytest.approx(before["valid_loss"], rel=1e-3)


def test_a_compiled_network_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    data = fold_data(tmp_path / "images", 16)
    usual = train(tmp_path / "usual", data)
    compiled = train(
        tmp_path / "compiled", data, hardware=choose_hardware(HardwareOptions("cpu", "fp32", 0, compiled=True))
    )
    assert same(usual.model.state_dict(), compiled.model.state_dict())
    assert (
        load_checkpoint(tmp_path / "compiled" / "best.pt").keys()
        == load_checkpoint(tmp_path / "usual" / "best.pt").keys()
    )
