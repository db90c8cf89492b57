"""The tables of choices: each row keeps its table's promise, recipes know each name, and five lines add a row."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import recipes
from common.data.images import write_planes
from common.errors import UserError
from common.recipes import CHOICES, DEMO, OWN_POOLING, Recipe, get_recipe
from common.train import dataset, losses, networks, optimizers, schedules
from common.train.dataset import AUGMENTATIONS, Chance, ImageSet, Normalisation, augmented
from common.train.fold_data import FoldData
from common.train.hardware import Hardware
from common.train.loop import begin_fold, train_fold
from common.train.losses import LOSSES, RANKINGS, sample_losses
from common.train.networks import ENCODERS, build_encoder, build_model
from common.train.optimizers import OPTIMIZERS, build_optimizer, param_groups
from common.train.run import new_run, saved_pieces
from common.train.schedules import SCHEDULES, Schedule, has_ended, is_over, rate_factor
from common.train.step import train_step
from tests.conftest import ROOT, training_job

CPU = Hardware(torch.device("cpu"))
TABLES = {
    "encoder": ENCODERS,
    "base_loss": LOSSES,
    "hard_ranking": RANKINGS,
    "augmentations": AUGMENTATIONS,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
}
SMALL = replace(
    DEMO, size_divisor=16, buffers=(8,), batch_size=4, cycle_epochs=2, max_cycles=2, finder="off", evaluate_epochs=1
)


@pytest.fixture
def data(tmp_path):
    """Eight images of noise, the same ones for training and validation."""
    rng = np.random.default_rng(0)
    ids, targets = np.array([f"s{k}" for k in range(8)]), np.eye(8, 28, dtype=bool)
    for Id in ids:
        write_planes(tmp_path / f"{Id}.tif", rng.integers(0, 256, (4, SMALL.size, SMALL.size), dtype=np.uint8))
    images = ImageSet(tmp_path, ids, targets, SMALL.crop)
    return FoldData(images, replace(images, crop=None), targets.sum(axis=0), Normalisation((0.5,) * 4, (0.3,) * 4))


def fits(encoder: str) -> Recipe:
    """Return a recipe whose head fits an encoder."""
    return get_recipe("gapnet_pl") if encoder in OWN_POOLING else Recipe()


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", TABLES)
def test_recipes_know_the_names_of_each_table(field):
    assert sorted(CHOICES[field]) == sorted(TABLES[field])


@pytest.mark.parametrize("field", TABLES)
def test_an_unknown_name_is_told_with_the_nearest(field):
    name = CHOICES[field][0]
    with pytest.raises(UserError, match=f"recipe field {field} is '{name}x'; did you mean {name}.?? known: "):
        get_recipe("resnet50", [f"{field}={name}x"])


@pytest.mark.parametrize("field", TABLES)
def test_a_name_without_a_row_is_told_with_the_nearest(field):
    with pytest.raises(
        UserError, match=f"recipe field {field} is '{CHOICES[field][0]}0', which has no row in its table"
    ):
        recipes.row_of(TABLES[field], field, f"{CHOICES[field][0]}0")


def test_augmentations_are_several_names_or_none():
    assert get_recipe("resnet50", ["augmentations="]).augmentations == ()
    with pytest.raises(UserError, match="expected augmentations=<names separated by commas>"):
        get_recipe("resnet50", ["augmentations"])
    with pytest.raises(UserError, match="recipe field augmentations is 'dihedral'"):
        Recipe(augmentations="dihedral")


# --- each row keeps the promise of its table ---------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_its_parts_its_features_and_its_channels(name):
    row = ENCODERS[name]
    with torch.device("meta"):
        built, _ = row.build()
        assert (networks.stem(built)[1].in_channels == 4) == (name in OWN_POOLING)
        encoder, features = build_encoder(replace(fits(name), encoder=name))
        assert encoder.eval()(torch.zeros(2, 4, 96, 96)).shape[:2] == (2, features)
    assert row.split in dict(encoder.named_children())
    if weights := row.weights:
        assert re.fullmatch("[0-9a-f]{8,64}", weights.sha256) and all(
            url.startswith("https://") for url in weights.urls
        )
        assert len(weights.mean) == len(weights.std) == 3 and min(weights.std) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_each_class_and_falls_towards_the_truth(name):
    logits = torch.tensor([[-100.0, -2.0, 0.0, 2.0, 100.0]], requires_grad=True)
    for truth, order in ((1.0, 1), (0.0, -1)):
        found = LOSSES[name](logits, torch.full_like(logits, truth), Recipe())
        assert found.shape == logits.shape and found.isfinite().all() and (found >= 0).all()
        assert (order * found[0].diff() <= 0).all() and found[0, 2] > 0
        (slope,) = torch.autograd.grad(found.sum(), logits)
        assert slope.isfinite().all() and order * slope[0, 2] < 0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_depends_on_its_samples_numbers_alone_and_leaves_the_crop_as_it_is(name):
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (4, 9, 9), dtype=np.uint8)
    before, draws = crop.copy(), rng.random((40, 3))
    first, again = ([augmented(crop, (name,), draw) for draw in draws] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True)) and np.array_equal(crop, before)
    assert all(image.shape == crop.shape and image.dtype == np.uint8 and image.strides[0] == 1 for image in first)
    assert len({image.tobytes() for image in first}) > 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_a_rate_for_each_step_an_end_and_words(name):
    recipe = replace(Recipe(), schedule=name)
    losses = []
    for epoch in range(recipe.epochs):
        factors = [rate_factor(recipe, step, 10, losses) for step in range(10 * epoch, 10 * epoch + 10)]
        assert all(0 <= factor <= 1 for factor in factors)
        losses.append(1 / (epoch + 1))
        assert isinstance(is_over(recipe, epoch + 1, losses), bool)
    assert rate_factor(recipe, 0, 10, []) > 0 and "epochs" in SCHEDULES[name].describe(recipe)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_allows_more_cycles_has_the_same_rates_with_them(name):
    short = replace(Recipe(), schedule=name, max_cycles=2)
    whole, losses = replace(short, max_cycles=4), []
    if SCHEDULES[name].why_no_more(short, losses):
        return
    for step in range(10 * short.epochs):
        assert rate_factor(short, step, 10, losses) == rate_factor(whole, step, 10, losses)
        if step % 10 == 9:
            losses.append(1 + (step % 30) / 30)
            assert is_over(short, len(losses), losses) == is_over(whole, len(losses), losses)


def test_which_schedules_allow_more_cycles():
    refused = {name for name, row in SCHEDULES.items() if row.why_no_more(Recipe(), [])}
    assert refused == {"one-cycle"} and Schedule(lambda *_: 1.0).why_no_more(Recipe(), [])
    halved = replace(Recipe(), schedule="plateau", patience=0, max_halvings=2)
    assert SCHEDULES["plateau"].why_no_more(halved, [1, 2, 2]) is None
    assert "has halved max_halvings=2 times" in SCHEDULES["plateau"].why_no_more(halved, [1, 2, 2, 2])


def test_an_end_that_was_continued_is_none_but_the_rule_goes_on():
    recipe, losses = replace(Recipe(), cycle_epochs=1), [1.0, 1.0]
    assert has_ended(recipe, 2, losses, []) and not has_ended(recipe, 2, losses, [2])
    assert has_ended(recipe, 3, [*losses, 1.0], [2]) and not has_ended(recipe, 3, [*losses, 0.5], [2])
    assert has_ended(replace(recipe, max_cycles=2), 2, losses, [2])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_holds_each_parameter_and_resumes_exactly(name):
    recipe = replace(SMALL, optimizer=name)
    data = SimpleNamespace(counts=np.ones(28), train=range(4), normalisation=Normalisation((0.5,) * 4, (0.3,) * 4))
    images = torch.randint(0, 256, (4, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, resumed = new_run(recipe, data, CPU, 0, 0), new_run(recipe, data, CPU, 1, 0)
    for run in (whole, resumed):
        for group in run.optimizer.param_groups:
            group["lr"] = group["top_lr"]
    train_step(whole, images, torch.eye(4, 28), 4, 0.5, 0)
    resumed.restore(torch.load(saved_to_memory(whole.state()), weights_only=True))
    for run in (whole, resumed):
        train_step(run, images, torch.eye(4, 28), 4, 0.5, 1)
    for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def saved_to_memory(state):
    from io import BytesIO

    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_the_state_of_a_run_is_what_its_fields_declare():
    pieces = saved_pieces(
        new_run(SMALL, SimpleNamespace(counts=np.ones(28), train=range(4), normalisation=None), CPU, 0, 0)
    )
    assert list(pieces)[:4] == ["model", "optimizer", "scaler", "ranking"] and len(pieces) == 18
    assert [name for name, how in pieces.items() if how.later] == ["skipped", "start_file", "continued", "average"]


# --- what does not fit is an error -------------------------------------------------------------------------


def test_an_encoder_that_cannot_split_is_told(monkeypatch):
    monkeypatch.setitem(ENCODERS, "resnet10_narrow", replace(ENCODERS["resnet10_narrow"], split="layer5"))
    with pytest.raises(UserError, match="encoder resnet10_narrow should split at 'layer5', .*; did you mean"):
        build_model(SMALL, 28)


def test_a_loss_of_another_shape_is_told(monkeypatch):
    monkeypatch.setitem(LOSSES, "bce", lambda logits, targets, recipe: logits.sum(dim=1))
    with pytest.raises(UserError, match=r"base_loss=bce returns the shape \(2,\), expected \(2, 28\)"):
        sample_losses(torch.zeros(2, 28), torch.zeros(2, 28), torch.ones(28), Recipe(base_loss="bce"))


@pytest.mark.parametrize("wrong", [lambda image, chance: image[:, 1:], lambda image, chance: image / 255])
def test_an_augmentation_that_gives_something_else_is_told(monkeypatch, wrong):
    monkeypatch.setitem(AUGMENTATIONS, "dihedral", wrong)
    with pytest.raises(UserError, match=r"augmentation dihedral returns .*, expected uint8 \(4, 9, 9\)"):
        augmented(np.zeros((4, 9, 9), dtype=np.uint8), ("dihedral",), np.zeros(3))


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_schedule_with_an_impossible_rate_is_told(monkeypatch, factor):
    monkeypatch.setitem(SCHEDULES, "constant", replace(SCHEDULES["constant"], factor=lambda *_: factor))
    with pytest.raises(UserError, match="schedule=constant returns the factor .* at step 3, expected 0 or more"):
        rate_factor(Recipe(schedule="constant"), 3, 10, [])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda recipe, groups: torch.optim.SGD(groups[:1], lr=0.0), "must hold all given parameters"),
        (
            lambda recipe, groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.0),
            "groups without 'top_lr'",
        ),
    ],
)
def test_an_optimizer_that_forgets_something_is_told(monkeypatch, wrong, told):
    monkeypatch.setitem(OPTIMIZERS, "sgd", wrong)
    model = build_model(SMALL, 28)
    with pytest.raises(UserError, match=f"optimizer=sgd .*{told}"):
        build_optimizer(SMALL, param_groups(model, (1.0, 2.0)))


# --- the lines of CONTRIBUTING.md add a row ----------------------------------------------------------------


def documented(heading: str) -> str:
    """Return the Python code under a heading of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n### ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


ADDED = {
    "an encoder": ("encoder", networks, "resnet34"),
    "a loss": ("base_loss", losses, "softened"),
    "an augmentation": ("augmentations", dataset, "dimmed"),
    "a schedule": ("schedule", schedules, "linear"),
    "an optimizer": ("optimizer", optimizers, "adagrad"),
}


@pytest.mark.parametrize("heading", ADDED)
def test_the_documented_lines_add_a_row_that_trains(heading, data, tmp_path, monkeypatch):
    field, module, name = ADDED[heading]
    code = documented(heading)
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 5
    for table in (CHOICES, TABLES[field]):
        for key, value in list(table.items()):
            monkeypatch.setitem(table, key, value)  # undone after the test
    monkeypatch.setitem(TABLES[field], name, None)
    # The lines belong into the tables' files: here they see the names of both files.
    exec(compile(code, "CONTRIBUTING.md", "exec"), {**vars(module), "CHOICES": CHOICES})
    assert name in CHOICES[field] and TABLES[field][name] is not None
    choice = ("dihedral", name) if field == "augmentations" else name
    recipe = replace(SMALL, **{field: choice}, min_cycle_gain=0.0)
    job = training_job(tmp_path / "run", recipe)
    rows = replace(data, train=replace(data.train, augmentations=recipe.augmentations))
    run = train_fold(begin_fold(job, rows, CPU), job, rows)
    assert run.epoch >= 1 and np.isfinite(run.valid_losses).all() and (tmp_path / "run" / "best.pt").is_file()
    again = begin_fold(job, rows, CPU)
    assert again.history == run.history and again.recipe == recipe


def test_more_random_numbers_are_those_of_the_sample():
    first, again, other = (
        Chance(np.array(draw)).generator.random(4) for draw in ([0.1, 0.2, 0.3],) * 2 + ([0.1, 0.2, 0.4],)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
