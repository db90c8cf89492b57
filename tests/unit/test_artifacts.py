import json

import numpy as np
import pytest

from common.artifacts.files import write_json, write_text, writing
from common.artifacts.predictions import load_predictions, save_predictions
from common.artifacts.stage import Record, Stage, fingerprint, sidecar
from common.classes import N_CLASSES
from common.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), writing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_predictions_come_back_as_written(tmp_path):
    ids, probs = ["b", "a"], np.random.default_rng(0).random((2, N_CLASSES))
    save_predictions(tmp_path / "p.npz", ids, probs)
    read_ids, read_probs = load_predictions(tmp_path / "p.npz", "")
    assert list(read_ids) == ids
    np.testing.assert_array_equal(read_probs, probs.astype(np.float32))


@pytest.mark.parametrize(
    ("ids", "probs", "message"),
    [
        (["a", "a"], np.zeros((2, N_CLASSES)), "appear more than once:\n  a"),
        (["a", "b"], np.full((2, N_CLASSES), 1.5), "in \\[0, 1\\]"),
        (["a", "b"], np.full((2, N_CLASSES), np.nan), "NaN"),
        (["a", "b"], np.zeros((2, 27)), r"expected probabilities of shape \(2, 28\), found \(2, 27\)"),
    ],
)
def test_bad_predictions_are_refused(tmp_path, ids, probs, message):
    with pytest.raises(UserError, match=message):
        save_predictions(tmp_path / "p.npz", ids, probs)
    assert not list(tmp_path.iterdir())


def test_no_pickle_is_loaded(tmp_path):
    np.savez(tmp_path / "p.npz", ids=np.array([{}], dtype=object), probs=np.zeros((1, 28)), classes=np.zeros(28))
    with pytest.raises(UserError, match="is not a predictions file"):
        load_predictions(tmp_path / "p.npz", "python 05_predict_oof.py")


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="p.npz is missing; run: python 05_predict_oof.py"):
        load_predictions(tmp_path / "p.npz", "python 05_predict_oof.py")


def make_stage(folder, parameter=1, text="input"):
    write_text(folder / "in.txt", text)
    return Stage("0x_stage", folder / "out.txt", {"parameter": parameter}, {"in.txt": folder / "in.txt"})


def test_a_stage_is_stale_until_sealed_and_after_any_change(tmp_path):
    stage = make_stage(tmp_path)
    assert stage.why_stale() == "not made yet"
    write_text(stage.artifact, "made")
    assert stage.why_stale() == "not made yet"
    stage.seal(Record(1))
    assert make_stage(tmp_path).why_stale() is None
    assert make_stage(tmp_path, parameter=2).why_stale() == "parameter was 1, now 2"
    assert make_stage(tmp_path, text="other").why_stale() == "changed: in.txt"
    write_text(stage.artifact, "edited")
    assert make_stage(tmp_path).why_stale() == "out.txt is not the file that 0x_stage wrote"


def test_a_rewritten_equal_input_changes_nothing(tmp_path):
    before = make_stage(tmp_path)
    assert make_stage(tmp_path).inputs == before.inputs == {"in.txt": fingerprint(tmp_path / "in.txt")}


def test_what_is_made_is_sealed_at_the_end_and_not_before(tmp_path, capsys):
    stage = make_stage(tmp_path)
    with stage.making() as record:
        assert not stage.sidecar.exists()
        write_text(stage.artifact, "made")
        record.rows, record.notes = 7, {"folds": [0]}
    assert stage.is_current() and capsys.readouterr().out == ""
    meta = json.loads(stage.sidecar.read_text())
    assert (meta["rows"], meta["folds"]) == (7, [0])
    stage.say_current()
    assert capsys.readouterr().out == f"0x_stage: {stage.artifact} is up to date\n"


def test_what_is_not_finished_has_no_seal_and_no_lock(tmp_path, capsys):
    stage = make_stage(tmp_path)
    with stage.making():
        write_text(stage.artifact, "made")
    changed = make_stage(tmp_path, parameter=2)
    with pytest.raises(ZeroDivisionError), changed.making():
        raise ZeroDivisionError
    assert capsys.readouterr().out == f"0x_stage: making {stage.artifact} again (parameter was 1, now 2)\n"
    assert changed.why_stale() == "not made yet"
    with make_stage(tmp_path).lock():
        pass


def test_a_stage_that_holds_its_lock_may_make_and_others_may_not(tmp_path, monkeypatch):
    monkeypatch.setattr("common.artifacts.locks.SECONDS_OF_GRACE", 0)
    stage = make_stage(tmp_path)
    with stage.lock(), stage.making():
        write_text(stage.artifact, "made")
        with pytest.raises(UserError, match="is being made by"), make_stage(tmp_path).making():
            pass
    assert stage.is_current()


def test_a_sidecar_says_what_its_artifact_was_made_from(tmp_path):
    stage = make_stage(tmp_path)
    write_text(stage.artifact, "made")
    stage.seal(Record(7))
    meta = json.loads(sidecar(stage.artifact).read_text())
    assert (meta["stage"], meta["parameters"], meta["rows"]) == ("0x_stage", {"parameter": 1}, 7)
    assert meta.keys() >= {"inputs", "outputs", "seconds"}


def test_a_damaged_sidecar_is_an_error_with_its_name(tmp_path):
    stage = make_stage(tmp_path)
    write_json(stage.sidecar, {})
    stage.sidecar.write_text("{")
    with pytest.raises(UserError, match="out.txt.meta.json is not valid JSON"):
        stage.why_stale()


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": None},
        {"inputs": ["in.txt"]},
        {"outputs": "out.txt"},
        {"outputs": {"out.txt": "x", "/etc/passwd": "x"}},
        {"outputs": {"/etc/passwd": "x", "out.txt": "x"}},
        {"outputs": {"out.txt": "x", "a\0b": "x"}},
    ],
)
def test_one_wrong_part_of_a_sidecar_is_enough(tmp_path, changes):
    stage = make_stage(tmp_path)
    write_text(stage.artifact, "made")
    stage.seal(Record(1))
    write_json(stage.sidecar, json.loads(stage.sidecar.read_text()) | changes)
    with pytest.raises(UserError, match="out.txt.meta.json is not a record that a stage wrote; delete it"):
        stage.why_stale()


def test_inputs_that_another_process_wrote_anew_are_noticed(tmp_path):
    stage = make_stage(tmp_path)
    inputs = {name: tmp_path / name for name in stage.inputs}
    stage.check_unchanged(inputs)
    next(iter(inputs.values())).write_text("other")
    with pytest.raises(
        UserError, match=r"another process rewrote its inputs while this command ran \(changed: .*\); run it again"
    ):
        stage.check_unchanged(inputs)
