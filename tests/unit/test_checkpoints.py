"""Checkpoints of other versions: each ends in one message with the file and the cure; --force clears them."""

import hashlib
import re
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.artifacts.files import write_json
from common.artifacts.stage import Record, Stage, sidecar
from common.classes import CLASS_NAMES
from common.errors import UserError
from common.recipes import Recipe, get_recipe, recipe_of_run, run_parameters
from common.train.checkpoints import (
    FORMAT,
    check_alike,
    check_unfinished,
    load_checkpoint,
    load_network,
    made_from,
    prepare,
    save_checkpoint,
)
from common.train.dataset import Normalisation
from common.train.loop import begin_fold
from common.train.networks import build_model
from common.train.predict import Hardware
from common.train.run import new_run
from tests.conftest import training_job

CPU = Hardware(torch.device("cpu"))
RECIPE = Recipe(encoder="resnet10_narrow", buffers=(8,))
DATA = SimpleNamespace(normalisation=Normalisation((0.5,) * 4, (0.3,) * 4), counts=np.ones(28), train=range(3))
GONE = object()
CURE = "train the fold again with --force, or use the version that wrote it"


@pytest.fixture(scope="module")
def state():
    return {**new_run(RECIPE, DATA, CPU, 0, 0).state(), "made_from": {"parameters": {}, "inputs": {}}}


def written(folder, state, **changes):
    """Save a checkpoint with changed values, without those that are GONE."""
    values = {key: value for key, value in {**state, **changes}.items() if value is not GONE}
    save_checkpoint(folder / "last.pt", values)
    return folder / "last.pt"


def test_a_checkpoint_as_it_is_written_is_read(tmp_path, state):
    path = written(tmp_path, state)
    assert load_checkpoint(path).keys() == {*state, "made_with"}
    assert load_network(path, RECIPE, CPU)[1] == DATA.normalisation and made_from(tmp_path) == state["made_from"]
    assert begin_fold(training_job(tmp_path, RECIPE), DATA, CPU).epoch == 0


@pytest.mark.parametrize("fast", [True, False])
def test_a_network_that_predicts_runs_on_the_kernels_that_were_asked_for(tmp_path, state, fast):
    load_network(written(tmp_path, state), RECIPE, replace(CPU, fast=fast))
    assert torch.are_deterministic_algorithms_enabled() != fast and torch.backends.cudnn.allow_tf32 == fast


@pytest.mark.parametrize("key", ["model", "mean", "std", "classes", "recipe"])
def test_what_every_checkpoint_has_must_be_there(tmp_path, state, key):
    path = written(tmp_path, state, **{key: GONE})
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not a checkpoint ") and f"has no {key!r}; {CURE}" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"model": [1]},
        {"mean": 0.5},
        {"mean": [0.5]},
        {"std": ["a"] * 4},
        {"std": [0.5, "a", 0.5, 0.5]},
        {"mean": [0.5, 0.5, 0.5, None]},
        {"mean": [0.5] * 5},
        {"classes": "Nucleoplasm"},
        {"recipe": []},
        {"made_from": "x"},
        {"epoch": "1"},
        {"ranking": [1]},
        {"history": {}},
        {"optimizer": 3},
    ],
)
def test_values_must_be_of_the_kind_that_is_written(tmp_path, state, changes):
    path = written(tmp_path, state, **changes)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not a checkpoint ") and f"no valid {list(changes)[0]!r}; {CURE}" in message


@pytest.mark.parametrize("made", [GONE, {}, {"parameters": {}, "inputs": "folds.csv"}])
def test_without_what_it_was_made_from_a_training_cannot_go_on(tmp_path, state, made):
    written(tmp_path, state, made_from=made)
    with pytest.raises(UserError, match="last.pt does not record .* made from; train the fold again with --force"):
        made_from(tmp_path)


def test_of_other_classes_the_first_is_named(tmp_path, state):
    names = [*CLASS_NAMES[:2], "Golgi", *CLASS_NAMES[3:]]
    with pytest.raises(UserError) as error:
        load_checkpoint(written(tmp_path, state, classes=names))
    assert str(error.value) == (
        f"{tmp_path}/last.pt was trained for other classes: class 2 is 'Golgi', expected {CLASS_NAMES[2]!r}; {CURE}"
    )
    with pytest.raises(
        UserError, match="was trained for 27 classes, expected the 28 of this project; train the fold again"
    ):
        load_checkpoint(written(tmp_path, state, classes=names[1:]))


def other_names(model):
    return {name.replace("conv1.0.", "conv1."): tensor for name, tensor in model.items()}


def other_shapes(model):
    return {**model, "head.4.bias": torch.zeros(3)}


def no_tensors(model):
    return {name: "weights" for name in model}


@pytest.mark.parametrize(
    ("change", "told"),
    [(other_names, "conv1.0.weight"), (other_shapes, "size mismatch for head.4.bias"), (no_tensors, "head.4.bias")],
)
def test_another_networks_tensors_are_one_message(tmp_path, state, change, told):
    path = written(tmp_path, state, model=change(state["model"]))
    for read in (
        lambda: load_network(path, RECIPE, CPU),
        lambda: begin_fold(training_job(tmp_path, RECIPE), DATA, CPU),
    ):
        with pytest.raises(UserError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"{path} does not fit the network of this version (Error(s) in loading state_dict")
        assert CURE in message and len(message) < 600 and (told in message or change is no_tensors)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epoch": GONE}, "it has no 'epoch'"),
        ({"optimizer": GONE}, "it has no 'optimizer'"),
        ({"optimizer": {}}, "it has no 'param_groups'"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "different number of parameter"),
    ],
)
def test_parts_of_a_training_that_are_missing_are_one_message(tmp_path, state, changes, told):
    written(tmp_path, state, **changes)
    with pytest.raises(UserError, match="last.pt does not fit the network of this version") as error:
        begin_fold(training_job(tmp_path, RECIPE), DATA, CPU)
    assert told in str(error.value)


class Malicious:
    """An object whose unpickling runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_in_a_checkpoint_is_run(tmp_path, legacy):
    torch.save(
        {"model": Malicious(tmp_path / "owned")}, tmp_path / "last.pt", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(UserError, match="last.pt is not a readable checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "last.pt", weights_only=False)  # it would have
    assert (tmp_path / "owned").exists()


def test_a_checkpoint_that_claims_more_than_its_size_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": torch.zeros(10**7)})
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(
        UserError, match=r"b.pt is not a readable checkpoint .claims 40,\d{3},\d{3} bytes in \d\d,\d{3}"
    ):
        load_checkpoint(tmp_path / "b.pt")


# --- clearing ----------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_deleted_is_told_and_not_taken_for_new(tmp_path, monkeypatch):
    def refused(folder, *_, **__):
        raise PermissionError(13, "Permission denied", "best.pt")

    (tmp_path / "fold0").mkdir()
    stage = Stage("04_train", tmp_path / "fold0" / "best.pt", {}, {}, whole=tmp_path / "fold0")
    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(UserError) as error:
        prepare([stage], force=True)
    for part in ("--force", f"{tmp_path}/fold0 (best.pt: Permission denied)", "permission", "another --work"):
        assert part in str(error.value)


def test_a_run_that_is_a_link_is_not_cleared_in_silence(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "best.pt").touch()
    (tmp_path / "fold0").symlink_to(tmp_path / "elsewhere")
    stage = Stage("04_train", tmp_path / "fold0" / "best.pt", {}, {}, whole=tmp_path / "fold0")
    with pytest.raises(UserError, match="--force cannot delete .*fold0 .*symbolic link"):
        prepare([stage], force=True)
    (tmp_path / "fold0").unlink()
    prepare([stage], force=True)  # nothing is there
    assert (tmp_path / "elsewhere" / "best.pt").exists()


def test_a_finished_training_of_another_format_asks_for_force(tmp_path):
    (tmp_path / "best.pt").touch()
    now = run_parameters(RECIPE, 0, 0, FORMAT)
    Stage("04_train", tmp_path / "best.pt", {**now, "checkpoint_format": FORMAT - 1}, {}).seal(Record(1))
    with pytest.raises(
        UserError, match=rf"something else \(checkpoint_format was {FORMAT - 1}, now {FORMAT}\); use --force"
    ):
        check_unfinished(Stage("04_train", tmp_path / "best.pt", now, {}))
    assert recipe_of_run(now) == RECIPE


# --- networks ----------------------------------------------------------------------------------------------

PINNED_FORMAT, PINNED = (
    4,
    {
        "resnet10_narrow": "6c6e29359ffa128a",
        "densenet50": "5aeadbe4b3da09df",
        "gapnet_pl": "3436de7aa1d089c9",
        "gapnet_pl_plus": "cd08d357dbfbe7b2",
    },
)


def network_digest(encoder: str) -> str:
    """Return a digest of a network's modules in order, with their settings, and of its tensors' names and shapes."""
    own = (
        {"pooling": "own", "head_order": "linear-selu-dropout"} if encoder.startswith("gapnet") else {"pooling": "acp"}
    )
    with torch.device("meta"):
        model = build_model(Recipe(encoder=encoder, buffers=(64,), dropouts=(0.5,), **own), 28)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    printed = re.sub(
        r"affine=True, (?!bias)", "affine=True, bias=True, ", f"{model!r}"
    )  # older releases of torch leave it out
    return hashlib.sha256(f"{printed}{shapes}".encode()).hexdigest()[:16]


def test_a_network_that_changes_has_checkpoints_of_a_new_format():
    found = {
        encoder: network_digest(encoder) for encoder in ("resnet10_narrow", "densenet50", "gapnet_pl", "gapnet_pl_plus")
    }
    changed = [encoder for encoder in found if found[encoder] != PINNED.get(encoder)]
    assert FORMAT == PINNED_FORMAT and not changed, (
        f"networks changed: {changed}. Checkpoints of before must not be read as theirs: add one to FORMAT in "
        f"common/train/checkpoints.py, then set PINNED_FORMAT to it and PINNED to {found}. "
        "Only where torch merely prints its layers in another way FORMAT stays"
    )


def test_folds_of_different_recipes_are_not_put_together(tmp_path):
    for fold, settings, seed in ((0, [], 0), (1, [], 5), (2, ["batch_size=8"], 0)):
        path = tmp_path / "runs" / "demo" / f"fold{fold}" / "best.pt"
        write_json(
            sidecar(path),
            {"parameters": run_parameters(get_recipe("demo", settings), fold, seed, 1), "inputs": {}, "outputs": {}},
        )
    check_alike(tmp_path, "demo", [0, 1, 7])
    with pytest.raises(
        UserError,
        match=r"folds 0 and 2 of demo were trained with different recipes: batch_size 16 and 8; .* --folds 2 --force",
    ):
        check_alike(tmp_path, "demo", [0, 1, 2])
