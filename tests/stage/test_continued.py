"""Trainings that continue from somewhere: more cycles, networks of other runs, files of weights."""

import json
import shutil

import pytest
import torch

from common.artifacts.files import read_json, read_lines
from common.artifacts.layout import Layout
from common.artifacts.stage import fingerprint, sidecar
from common.train.checkpoints import load_checkpoint
from common.train.loop import relabel
from tests.slow.test_training import UNSTEADY, same

TINY = ("cycle_epochs=1", "buffers=16", "min_cycle_gain=0")
ONCE = ("cycle_epochs=1", "buffers=16", "max_cycles=1")
EXTRAS = ("ema=0.9", "checkpointing=true")


@pytest.fixture
def layout(run_script, small_data, tmp_path) -> Layout:
    """A work folder up to stage 03, with images of two sizes."""
    places = ("--data", small_data, "--work", tmp_path / "work")
    run_script("01_preprocess.py", *places, "--recipes", "demo-quick,demo@512-quick")
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)
    return Layout(tmp_path / "work", small_data)


@pytest.fixture
def train(run_script, layout):
    """Return a function that runs stage 04 and returns its output."""
    return lambda *flags: run_script("04_train.py", *layout.flags(), *flags).stdout


@pytest.fixture
def refused(fails, layout):
    """Return a function that runs stage 04, which must refuse, and returns its message."""
    return lambda *flags: fails("04_train.py", *layout.flags(), *flags)


def log_of(layout, name, fold=0):
    """Return a log's rows without what differs from run to run."""
    rows = read_lines(layout.run(name, fold) / "log.jsonl")
    return [{key: value for key, value in row.items() if key not in UNSTEADY} for row in rows]


def assert_the_same_training(layout, one, other, fold=0):
    """Check that two runs have the same networks, byte for byte, and the same state and log."""
    best = [layout.network(name, fold).read_bytes() for name in (one, other)]
    assert best[0] == best[1] and log_of(layout, one, fold) == log_of(layout, other, fold)
    last = [load_checkpoint(layout.network(name, fold, "last")) for name in (one, other)]
    for state in last:
        for key in ("made_from", "continued"):
            state.pop(key)
    assert same(*last)


# --- more cycles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), EXTRAS, ("schedule=constant",)], ids=["cycles", "averaged", "constant"])
def test_a_training_with_more_cycles_is_the_one_that_had_them_from_the_start(train, layout, settings):
    train("--recipe", "demo-quick", "--name", "whole", "--folds", "0", "--set", *TINY, "max_cycles=4", *settings)
    train("--recipe", "demo-quick", "--name", "grown", "--folds", "0", "--set", *TINY, "max_cycles=2", *settings)
    out = train("--recipe", "grown", "--folds", "0", "--more-cycles", "2")
    assert "grown fold 0: ended after 2 epochs, and continues to at most 4" in out and "resuming at epoch 3" in out
    assert_the_same_training(layout, "grown", "whole")

    # Without the flag, and with it again, there is nothing to do.
    assert "is up to date" in train("--recipe", "grown", "--folds", "0")
    again = train("--recipe", "grown", "--folds", "0", "--more-cycles", "2")
    assert (
        "already has --more-cycles 2, counted from its first end after 2 epochs" in again and "is up to date" in again
    )
    record = read_json(sidecar(layout.network("grown", 0)))
    assert record["parameters"]["max_cycles"] == 4 and record["parameters"]["continued"] == {"asked": 2, "after": [2]}
    more = len(log_of(layout, "grown")) - 2
    assert f"2+{more}" in train("--list-runs")


def test_one_cycle_after_another_is_the_same_too(train, layout):
    settings = (*TINY, "schedule=constant", "learning_rates=0.001,0.001")
    train("--recipe", "demo-quick", "--name", "whole", "--folds", "0", "--set", *settings, "max_cycles=4")
    train("--recipe", "demo-quick", "--name", "grown", "--folds", "0", "--set", *settings, "max_cycles=2")
    train("--recipe", "grown", "--folds", "0", "--more-cycles", "1")
    train("--recipe", "grown", "--folds", "0", "--more-cycles", "2")
    assert len(log_of(layout, "whole")) == 4, "the rule ended it, so that this test compares nothing"
    assert_the_same_training(layout, "grown", "whole")


def test_a_training_that_ended_early_goes_on_and_ends_by_the_same_rule(train, layout):
    train(
        "--recipe",
        "demo-quick",
        "--name",
        "early",
        "--folds",
        "0",
        "--set",
        *TINY[:2],
        "min_cycle_gain=0.9",
        "max_cycles=5",
    )
    assert len(log_of(layout, "early")) == 2  # the second cycle gained less than nine tenths
    train("--recipe", "early", "--folds", "0", "--more-cycles", "2")
    assert len(log_of(layout, "early")) == 3
    record = read_json(sidecar(layout.network("early", 0)))
    assert record["parameters"]["max_cycles"] == 4 and record["parameters"]["continued"] == {"asked": 5, "after": [2]}
    train("--recipe", "early", "--folds", "0", "--more-cycles", "3")
    assert len(log_of(layout, "early")) == 4
    assert "is up to date" in train("--recipe", "early", "--folds", "0")


def test_later_stages_see_the_new_network_and_folds_of_different_length_go_together(train, run_script, fails, layout):
    places = layout.flags()
    train("--recipe", "demo-quick", "--name", "grown", "--set", *TINY, "max_cycles=2")
    run_script("05_predict_oof.py", *places, "--recipes", "grown")
    run_script("06_thresholds.py", *places, "--recipes", "grown", "--method", "half")
    before = fingerprint(layout.network("grown", 0))
    train("--recipe", "grown", "--folds", "0", "--more-cycles", "2")
    assert fingerprint(layout.network("grown", 0)) != before  # at least the recipe in it
    message = fails("06_thresholds.py", *places, "--recipes", "grown", "--method", "half")
    assert "oof.npz is of an earlier training of fold 0 of grown; run: python 05_predict_oof.py" in message
    out = run_script("05_predict_oof.py", *places, "--recipes", "grown", "--folds", "0").stdout
    assert "again (changed: network)" in out and "left out" not in out
    assert "is based on all 2 folds (0, 1)" in run_script("05_predict_oof.py", *places, "--recipes", "grown").stdout
    run_script("06_thresholds.py", *places, "--recipes", "grown", "--method", "half")
    run_script("08_report.py", *places)
    assert "2+" in layout.report.read_text()


def test_what_cannot_be_continued_is_refused_by_name_before_anything_changes(train, refused, layout):
    train("--recipe", "demo-quick", "--name", "fine", "--folds", "0", "--set", *TINY, "max_cycles=2")
    once = ("--set", *TINY[:2], "schedule=one-cycle", "max_cycles=2")
    train("--recipe", "demo-quick", "--name", "once", "--folds", "0", *once)
    train("--recipe", "demo-quick", "--name", "gone", "--folds", "0", "--set", *TINY, "max_cycles=2")
    layout.network("gone", 0, "last").unlink()
    before = fingerprint(sidecar(layout.network("fine", 0)))
    message = refused("--recipe", "fine,once,gone", "--folds", "0,1", "--more-cycles", "1")
    assert "once fold 0: with schedule=one-cycle, learning rates depend on the number of epochs" in message
    assert "fine fold 1: it has not begun; run: python 04_train.py" in message
    assert "gone fold 0: " in message and "last.pt no longer exists" in message and "fine fold 0" not in message
    assert fingerprint(sidecar(layout.network("fine", 0))) == before

    flags = ("--recipe", "fine", "--folds", "0", "--more-cycles", "1")
    assert "--more-cycles and --force contradict" in refused(*flags, "--force")
    assert "--more-cycles and --start-from contradict" in refused(*flags, "--start-from", "once")
    assert "seed was 0, now 1" in refused(*flags, "--seed", "1")


def test_a_training_that_was_stopped_before_its_end_is_not_continued(train, refused, layout):
    train("--recipe", "demo-quick", "--name", "half", "--folds", "0", "--set", *TINY, "max_cycles=2")
    path = layout.network("half", 0, "last")
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "epoch": 1, "history": saved["history"][:1]}, path)
    sidecar(layout.network("half", 0)).unlink()
    message = refused("--recipe", "half", "--folds", "0", "--more-cycles", "1")
    assert "half fold 0: it is not finished, but in epoch 2; run: " in message


@pytest.mark.parametrize("flag", [(), ("--more-cycles", "2")], ids=["without the flag", "the same command"])
def test_killed_right_after_the_state_was_changed_it_has_its_cycles(train, layout, flag):
    train("--recipe", "demo-quick", "--name", "whole", "--folds", "0", "--set", *TINY, "max_cycles=4")
    train("--recipe", "demo-quick", "--name", "grown", "--folds", "0", "--set", *TINY, "max_cycles=2")
    kept = shutil.copytree(layout.run("grown", 0), layout.work / "kept")
    train("--recipe", "grown", "--folds", "0", "--more-cycles", "2")
    # As the kill leaves it: the old network, the new state at its old epoch, no sidecar.
    last = load_checkpoint(layout.network("grown", 0, "last"))
    begun = {**load_checkpoint(kept / "last.pt"), **{key: last[key] for key in ("recipe", "continued", "made_from")}}
    shutil.rmtree(layout.run("grown", 0))
    shutil.copytree(kept, layout.run("grown", 0))
    torch.save(begun, layout.network("grown", 0, "last"))
    sidecar(layout.network("grown", 0)).unlink()
    assert "resuming at epoch 3" in train("--recipe", "grown", "--folds", "0", *flag)
    assert_the_same_training(layout, "grown", "whole")


def test_a_network_is_relabelled_once(train, layout):
    train("--recipe", "demo-quick", "--name", "a", "--folds", "0", "--set", *TINY, "max_cycles=2")
    path, before = layout.network("a", 0), layout.network("a", 0).stat().st_mtime_ns
    from common.artifacts.experiments import read_experiments
    from common.recipes import named_recipe

    relabel(path, named_recipe("a", read_experiments(layout)))
    assert path.stat().st_mtime_ns == before


# --- the networks of other runs ----------------------------------------------------------------------------


@pytest.fixture
def small(train):
    """The run `small`, of both folds."""
    train("--recipe", "demo-quick", "--name", "small", "--set", *ONCE)


def test_each_fold_starts_from_its_own_network_of_a_run_of_smaller_images(train, refused, layout, small):
    out = train("--recipe", "demo@512-quick", "--name", "large", "--start-from", "small", "--set", *ONCE)
    for fold in (0, 1):
        told = f"from small fold {fold} (encoder and head), images normalised for these weights"
        assert f"large fold {fold}: {told}" in out
        record = read_json(sidecar(layout.network("large", fold)))
        assert record["start"] == told and record["start_file"] == f"../../small/fold{fold}/best.pt"
        assert record["inputs"]["weights"] == fingerprint(layout.network("small", fold))
        last = load_checkpoint(layout.network("large", fold, "last"))
        assert (last["start"], last["start_file"]) == (told, record["start_file"])
        assert last["made_from"]["inputs"]["weights"] == record["inputs"]["weights"]
    assert "is up to date" in train("--recipe", "large") and "is up to date" in train(
        "--recipe", "large", "--start-from", "small"
    )
    assert "a run cannot start from itself" in refused("--recipe", "small,large", "--start-from", "small", "--force")
    assert layout.network("small", 0).is_file()

    # Trained again otherwise, the other run has another network.
    train("--recipe", "demo-quick", "--name", "small", "--set", *ONCE, "--force", "--seed", "1")
    assert "note: large fold 0 started from small fold 0" in train("--recipe", "large", "--folds", "0")
    assert "(changed: weights); use --force" in refused("--recipe", "large", "--folds", "0", "--start-from", "small")


def test_a_network_that_has_seen_the_validation_samples_is_refused(train, refused, run_script, layout, small):
    file = layout.network("small", 1)
    flags = ("--recipe", "demo-quick", "--name", "leak", "--set", *ONCE)
    message = refused(*flags, "--pretrained", file)
    assert "is the network of fold 1, which was trained on the validation samples of fold 0" in message
    shutil.copy(file, layout.work / "copy.pt")  # also of a copy without its sidecar
    assert "trained on the validation samples of fold 0" in refused(*flags, "--pretrained", layout.work / "copy.pt")
    assert "leak fold 1: from copy.pt (encoder and head)" in train(
        *flags, "--folds", "1", "--pretrained", layout.work / "copy.pt"
    )

    # Other folds: a run on the earlier ones is no start, and whether a file fits cannot be known.
    run_script("03_make_folds.py", *layout.flags(), "--n-folds", 3)
    assert "was trained on something else (changed: folds.csv)" in refused(
        *flags[:3], "other", *flags[4:], "--start-from", "small"
    )
    out = train(*flags[:3], "other", *flags[4:], "--folds", "0", "--pretrained", layout.work / "copy.pt")
    assert "warning: " in out and "does not belong to" in out and "too good" in out


def test_a_run_that_is_unfinished_or_of_another_network_is_no_start(train, refused, layout):
    train("--recipe", "demo-quick", "--name", "small", "--folds", "0", "--set", *ONCE)
    flags = ("--recipe", "demo-quick", "--name", "large", "--start-from", "small", "--set", *ONCE)
    assert "fold1 has no finished training; run: python 04_train.py" in refused(*flags)
    assert "these are not weights of resnet18" in refused(*flags, "encoder=resnet18", "--folds", "0")
    assert "smalll/fold0 has no finished training" in refused(
        "--recipe", "demo-quick", "--start-from", "smalll", "--folds", "0"
    )
    assert "--start-from and --pretrained none contradict" in refused(*flags, "--pretrained", "none")
    out = train(*flags, "--folds", "0")
    out += train("--recipe", "large", "--folds", "1")
    assert (
        "note: large fold 1 starts from random weights" in out
        and "fold 0 of the same run started from small fold 0" in out
    )


def test_of_a_file_the_head_is_taken_if_it_fits(train, layout, tmp_path):
    train("--recipe", "demo-quick", "--name", "mine", "--folds", "0", "--set", *ONCE)
    file = layout.network("mine", 0)
    flags = ("--recipe", "demo-quick", "--folds", "0", "--pretrained", file, "--set", "cycle_epochs=1", "max_cycles=1")
    assert "(encoder; head from random weights: the file's has other layers)" in train(
        *flags, "buffers=8", "--name", "b"
    )
    assert "wide fold 0: from best.pt (encoder and head)" in train(*flags, "buffers=16", "--name", "wide")
    saved = torch.load(file, weights_only=True)
    head = {name: value for name, value in saved["model"].items() if name.startswith("head.")}
    small_rates = ("learning_rates=1e-12,1e-12", "hard_share=1")  # so that it ends about as it began
    train(*flags, "buffers=16", *small_rates, "--name", "still")
    model = torch.load(layout.network("still", 0), weights_only=True)["model"]
    assert all(
        torch.allclose(model[name], value, atol=1e-6)
        for name, value in head.items()
        if "running" not in name and "batches" not in name
    )
    row = json.loads((layout.run("still", 0) / "log.jsonl").read_text().splitlines()[0])
    assert row["start"] == "from best.pt (encoder and head), images normalised for these weights"
