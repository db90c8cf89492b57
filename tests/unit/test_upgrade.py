"""A newer version of the project: trainings and predictions of an older one stay current unless they really differ."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.artifacts.files import read_json
from common.artifacts.stage import Stage, sidecar
from common.artifacts.tables import read_table
from common.errors import UserError
from common.recipes import asked_recipe, continued_of, current_fields, get_recipe, recipe_of_run, run_parameters
from common.train.checkpoints import (
    FORMAT,
    check_unfinished,
    finished_checkpoint,
    load_checkpoint,
    load_network,
    relabel,
    save_checkpoint,
)
from common.train.continuing import continue_trainings
from common.train.dataset import Normalisation
from common.train.distributed import Team
from common.train.hardware import Hardware, HardwareOptions
from common.train.jobs import Request, plan
from common.train.loop import begin_fold, is_finished
from common.train.predict import PredictionJob, predict_job, predicted_folds
from common.train.run import Run, new_run, saved
from tests.conftest import training_job

CPU = Hardware(torch.device("cpu"))
SETTINGS = ["cycle_epochs=1", "max_cycles=2", "buffers=16", "min_cycle_gain=0", "hard_warmup_epochs=0"]
RECIPE = get_recipe("demo-quick", SETTINGS)
DATA = SimpleNamespace(normalisation=Normalisation((0.5,) * 4, (0.3,) * 4), counts=np.ones(28), train=range(7))


@pytest.fixture
def work(tmp_path):
    return shutil.copytree(Path(__file__).parent.parent / "data" / "trained", tmp_path / "work")


def planned(work, *settings):
    recipe = get_recipe("demo-quick", [*SETTINGS, *settings])
    return plan(Request(work, {"demo-quick": recipe}, [0]), read_table(work / "folds.csv", ""), Team())


def test_a_training_of_before_is_up_to_date(work, capsys):
    assert planned(work) == [] and "best.pt is up to date" in capsys.readouterr().out


def test_a_column_that_newer_versions_add_to_the_table_of_images_changes_nothing(work):
    path = work / "images" / "96.csv"
    first, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{first},dim", *(f"{row},0" for row in rows)]) + "\n")
    assert planned(work) == []
    path.write_text(path.read_text().replace("5dc5e761", "5dc5e762"))
    with pytest.raises(UserError, match="changed: images"):
        check_unfinished(planned(work)[0].stage)


def test_a_setting_that_differs_still_refuses(work):
    (job,) = planned(work, "l1=0.001")
    with pytest.raises(UserError, match=r"made from something else \(l1 was 0.0, now 0.001\)"):
        check_unfinished(job.stage)


def test_predictions_of_before_are_up_to_date(work, capsys):
    folds, samples = read_table(work / "folds.csv", ""), read_table(work / "samples.csv", "")
    means = {"test": samples[samples["part"] == "test"]}
    settings = {"tta": "none", "view": "whole", "checkpoint": "best"}
    hardware = HardwareOptions("cpu", "fp32", 0)
    predict_job(PredictionJob(work, "demo-quick", 0, folds, means, settings, 8, hardware))
    out = capsys.readouterr().out
    assert "fold0_oof.npz is up to date" in out and "fold0_test.npz is up to date" in out


@pytest.fixture
def both(work):
    """The work folder with a second fold trained, which has no predictions yet."""
    runs = work / "runs" / "demo-quick"
    shutil.copytree(runs / "fold0", runs / "fold1")
    return work


def together(work, **changes):
    folds = read_table(work / "folds.csv", "")
    settings = {"tta": "none", "view": "whole", "checkpoint": "best", **changes}
    return predicted_folds(PredictionJob(work, "demo-quick", 1, folds, {}, settings), [1])["oof"]


def test_folds_that_were_predicted_before_are_put_together_with_new_ones(both, capsys):
    assert together(both) == [0, 1] and not capsys.readouterr().out


def test_folds_that_were_predicted_otherwise_are_left_out_by_name(both, capsys):
    def left_out(**changes):
        assert together(both, **changes) == [1]
        return capsys.readouterr().out

    assert "fold0_oof.npz is left out of oof.npz: tta was none, now dihedral" in left_out(tta="dihedral")
    path = both / "runs" / "demo-quick" / "fold0" / "best.pt"
    meta = read_json(sidecar(path))
    sidecar(path).write_text(json.dumps({**meta, "parameters": {**meta["parameters"], "alpha": 0.5}}))
    assert "fold0_oof.npz is left out of oof.npz: fold 0 was trained with another recipe" in left_out()
    path.write_bytes(b"another")
    assert "fold0_oof.npz is left out of oof.npz: " in left_out()
    shutil.rmtree(both / "predictions")
    assert left_out() == ""


def test_a_network_of_before_predicts(work):
    path, recipe = finished_checkpoint(work, "demo-quick", 0, read_table(work / "folds.csv", ""), "best")
    assert recipe == RECIPE
    model, normalise = load_network(path, recipe, CPU)
    assert model.eval()(torch.zeros(1, 4, 64, 64)).shape == (1, 28) and normalise.mean[0] == pytest.approx(0.506176)


def test_a_training_of_before_is_continued(work):
    run = begin_fold(training_job(work / "runs" / "demo-quick" / "fold0", RECIPE), DATA, CPU)
    assert (
        run.epoch == 2
        and len(run.history) == 2
        and is_finished(run)
        and run.best_score == pytest.approx(0.0417, abs=1e-4)
    )


@dataclass
class NewerRun(Run):
    newer: int = saved(int, later=True, default=7)


def test_what_newer_versions_add_to_the_state_keeps_its_default(work):
    run = NewerRun(**vars(new_run(RECIPE, DATA, CPU, 0, 0)))
    run.restore(load_checkpoint(work / "runs" / "demo-quick" / "fold0" / "last.pt"))
    assert run.epoch == 2 and run.newer == 7
    run.restore({**run.state(), "newer": 8})
    assert run.newer == 8


@pytest.mark.parametrize(
    ("added", "refused"), [({"swa": 0.0, "teacher": "none"}, None), ({"swa": 0.99}, r"\(swa was 0.99, now absent\)")]
)
def test_a_training_of_a_version_with_more_fields(work, added, refused):
    path = work / "runs" / "demo-quick" / "fold0" / "best.pt"
    meta = read_json(sidecar(path))
    sidecar(path).write_text(json.dumps({**meta, "parameters": {**meta["parameters"], **added}}))
    jobs = planned(work)
    if refused is None:
        assert jobs == [] and recipe_of_run(read_json(sidecar(path))["parameters"]) == RECIPE
        before = torch.load(path, weights_only=True)
        save_checkpoint(path, {**before, "recipe": {**before["recipe"], **added}})
        load_network(path, RECIPE, CPU)
    else:
        with pytest.raises(UserError, match=refused):
            check_unfinished(jobs[0].stage)
        with pytest.raises(UserError, match="fields that this one does not have: swa=0.99"):
            finished_checkpoint(work, "demo-quick", 0, read_table(work / "folds.csv", ""), "best")


def test_parameters_that_are_off_make_no_stage_run_again(tmp_path):
    stage = partial(Stage, "01", tmp_path / "a.csv", inputs={})
    before = {"parameters": {"white_level": 4095}}
    assert stage(parameters={"white_level": 4095, "black_level": 0, "keep": False}).changes(before) is None
    assert stage(parameters={"white_level": 4095, "black_level": 9}).changes(before) == "black_level was absent, now 9"
    assert stage(parameters={"white_level": 0}).changes(before) == "white_level was 4095, now 0"


def test_a_training_of_before_gets_more_cycles(work, capsys):
    request = Request(work, {"demo-quick": RECIPE}, [0])
    continue_trainings(request, read_table(work / "folds.csv", ""), Team(), 2)
    (job,) = planned(work)
    assert job.recipe == get_recipe("demo-quick", [*SETTINGS[:1], "max_cycles=4", *SETTINGS[2:]])
    run = begin_fold(job, DATA, CPU)
    assert (run.epoch, run.continued, is_finished(run)) == (2, [2], False)
    relabel(job.folder / "best.pt", job.recipe)
    load_network(job.folder / "best.pt", job.recipe, CPU)
    assert "continues to at most 4" in capsys.readouterr().out


@pytest.mark.parametrize("continued", [3, {}, {"asked": 0, "after": [1]}, {"asked": 1, "after": []}, {"after": [1]}])
def test_a_damaged_record_of_more_cycles_is_a_change_and_no_crash(work, continued):
    path = work / "runs" / "demo-quick" / "fold0" / "best.pt"
    meta = read_json(sidecar(path))
    meta["parameters"] |= {"continued": continued}
    sidecar(path).write_text(json.dumps(meta))
    assert continued_of(meta["parameters"]) is None
    for job in planned(work):
        with pytest.raises(UserError, match="continued was"):
            check_unfinished(job.stage)
    assert asked_recipe(meta["parameters"]) == RECIPE


def test_missing_fields_of_a_run_get_their_defaults_and_its_own_stay():
    now = run_parameters(RECIPE, 0, 0, FORMAT)
    older = {name: value for name, value in now.items() if name != "focal_gamma"}
    assert current_fields(older) == now and current_fields({**now, "seed": 3})["seed"] == 3
