"""The model of a work folder: which networks, weights and thresholds, and what is refused."""

import json

import numpy as np
import pytest

from common.artifacts.files import write_json
from common.artifacts.stage import Record, Stage
from common.classes import CLASS_NAMES, N_CLASSES
from common.errors import UserError
from common.predict.model import Choice, Member, Model, open_model
from common.recipes import get_recipe, run_parameters
from common.score.calibration import calibrated, class_calibration
from common.score.ensemble import combine

RNG = np.random.default_rng(0)


def train(work, name, fold, recipe="demo", content=b"network"):
    """Write what a finished training leaves, but for the network itself."""
    path = work / "runs" / name / f"fold{fold}" / "best.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (path.parent / "log.jsonl").write_text("{}\n")
    Stage("04_train", path, run_parameters(get_recipe(recipe), fold, 0, 1), {}).seal(Record())


def tune(work, names, weights=None, folds=(0, 1), **more):
    """Write thresholds.json."""
    found = {
        "recipes": list(names),
        "combine": "weighted" if weights else "mean",
        "weights": weights or [1 / len(names)] * len(names),
        "thresholds": [0.3] * N_CLASSES,
        "folds": {name: list(folds) for name in names},
        "n_folds": 2,
        **more,
    }
    write_json(work / "thresholds.json", found)


@pytest.fixture
def work(tmp_path):
    for name in ("demo", "other"):
        for fold in (0, 1):
            train(tmp_path, name, fold, content=f"{name} {fold}".encode())
    return tmp_path


def members(model):
    return [(member.name, member.fold, round(member.weight, 6)) for member in model.members]


def test_members_are_those_that_stage_06_scored(work):
    tune(work, ["demo", "other"], [0.25, 0.75])
    model = open_model(work)
    assert members(model) == [("demo", 0, 0.125), ("demo", 1, 0.125), ("other", 0, 0.375), ("other", 1, 0.375)]
    assert (model.thresholds == 0.3).all() and not model.warnings and model.pixel_size == 0.08
    tune(work, ["demo"])
    assert members(open_model(work)) == [("demo", 0, 0.5), ("demo", 1, 0.5)]


def test_combined_is_what_stages_05_to_07_make(work):
    tune(work, ["demo", "other"], [0.25, 0.75])
    probs = RNG.random((4, 9, N_CLASSES), dtype=np.float32)
    runs = np.stack([combine(probs[:2], "mean"), combine(probs[2:], "mean")])
    assert np.array_equal(open_model(work).combined(probs), combine(runs, "weighted", [0.25, 0.75]))


def test_runs_and_folds_can_be_chosen(work):
    tune(work, ["demo", "other"], [0.25, 0.75])
    model = open_model(work, Choice(["other"], [1]))
    assert members(model) == [("other", 1, 1.0)] and model.scores is None
    assert "the thresholds are those of demo, other, not of other" in model.warnings[0]
    assert not open_model(work, Choice(None, [1])).warnings


def test_without_thresholds_there_is_a_warning_with_the_commands(work):
    model = open_model(work)
    assert len(model.members) == 4 and model.thresholds is None and (model.cuts == 0.5).all()
    assert "06_thresholds.py" in model.warnings[0] and "from 0.5" in model.warnings[0]
    probs = np.full((1, N_CLASSES), 0.1)
    probs[0, 7] = 0.2
    assert model.decide(probs)[0].nonzero()[0].tolist() == [7]


def test_a_training_that_is_not_finished_is_named(work):
    (work / "runs" / "demo" / "fold2").mkdir()
    (work / "runs" / "demo" / "fold2" / "log.jsonl").write_text("{}\n")
    assert any("fold2 has no finished training and is left out" in text for text in open_model(work).warnings)
    for choice in (Choice(["demo"], [0, 2]), Choice(["absent"])):
        with pytest.raises(UserError, match=r"not finished:\n.*\nrun: python 04_train.py .*choose others with --folds"):
            open_model(work, choice)


def test_thresholds_of_ranks_and_of_other_predictions(work):
    tune(work, ["demo"], combine="rank")
    with pytest.raises(UserError, match="ranks among many samples.*--combine mean"):
        open_model(work)
    tune(work, ["a.npz"])
    model = open_model(work)
    assert model.thresholds is None and "is for a.npz, not for networks of this folder" in model.warnings[0]


def test_networks_trained_again_after_the_thresholds_are_refused(work):
    tune(work, ["demo"])
    path = work / "predictions" / "demo" / "oof.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    known = [member.content for member in open_model(work).members]
    stage = Stage("05_predict_oof", path, {"folds": [0, 1]}, {})
    stage.seal(Record(notes={"networks": known}))
    open_model(work)
    train(work, "demo", 1, content=b"again")
    with pytest.raises(UserError, match=r"before these networks were trained again: demo fold 1; run: python 05_"):
        open_model(work)


def test_the_digest_changes_with_whatever_changes_answers(work):
    tune(work, ["demo"])
    first = open_model(work).digest
    assert open_model(work).digest == first != open_model(work, Choice(None, [0])).digest
    tune(work, ["demo"], thresholds=[0.4] * N_CLASSES)
    second = open_model(work).digest
    train(work, "demo", 0, content=b"again")
    assert len({first, second, open_model(work).digest}) == 3


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"x"), lambda path: None])
def test_what_is_no_model_is_refused(tmp_path, make):
    make(tmp_path / "model")
    with pytest.raises(UserError, match=r"neither a work folder with trained runs nor a package|is missing; expected"):
        open_model(tmp_path / "model")


def test_nothing_is_written_into_the_model(work):
    tune(work, ["demo"])
    before = sorted(work.rglob("*"))
    open_model(work)
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("broken", [[[1, 2]] * N_CLASSES, [[0, 1, "a"]] * N_CLASSES, [[0, 1, 1]] * 3, "x"])
def test_an_impossible_calibration_is_refused(work, broken):
    tune(work, ["demo"], calibration=broken)
    with pytest.raises(UserError, match="three numbers for each of 28 classes as calibration"):
        open_model(work)


@pytest.mark.parametrize("broken", [[], {"demo": 3}, {"demo": ["0"]}])
def test_impossible_folds_are_refused(work, broken):
    tune(work, ["demo"])
    write_json(work / "thresholds.json", json.loads((work / "thresholds.json").read_text()) | {"folds": broken})
    with pytest.raises(UserError, match="lists of numbers by network as folds"):
        open_model(work)


def test_the_views_are_those_that_the_thresholds_were_found_with(work):
    tune(work, ["demo"])
    path = work / "predictions" / "demo" / "fold0_oof.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    Stage("05_predict_oof", path, {"tta": "none", "view": "crops", "checkpoint": "../x"}, {}).seal(Record())
    model = open_model(work)
    assert (model.tta, model.view) == ("none", "crops")


def test_calibration_turns_shares_into_probabilities():
    """Probabilities that are twice too high come back as shares of positives."""
    truth = RNG.uniform(0.02, 0.48, (20000, 2))
    targets = RNG.random(truth.shape) < truth
    coefs = class_calibration(targets, 2 * truth)
    found = calibrated((2 * truth).astype(np.float32), coefs)
    assert np.abs(found - truth).mean() < 0.03
    identity = np.tile([0.0, 1.0, 1.0], (2, 1))
    np.testing.assert_allclose(calibrated(truth, identity), truth, rtol=1e-6)
    ends = calibrated(np.array([[0.0, 1.0]]), identity)
    assert np.isfinite(ends).all() and ends[0, 0] < 1e-6 and ends[0, 1] > 1 - 1e-6


def test_the_model_is_plain_data():
    model = Model("m", None, (Member("demo", 3, get_recipe("demo"), 1.0, None),))
    assert model.members[0].label == "demo fold 3" and model.members[0].side == 192
    assert model.classes == CLASS_NAMES and json.dumps(model.names) == '["demo"]'
