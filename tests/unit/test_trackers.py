"""Trackers: each has every epoch of a training once, and none can end it."""

import json
import struct
import time

import pytest

from common.artifacts.layout import Layout
from common.classes import CLASS_NAMES
from common.errors import UserError
from common.process import command_line
from common.train import trackers
from common.train.trackers import TRACKERS, Opened, Tracked, Tracker, check_trackers, track_finished, tracking

ROWS = [
    {
        "epoch": k,
        "cycle": 1,
        "learning_rate": 0.1 / k,
        "train_loss": 1 / k,
        "seconds": 2.0,
        "images_per_second": 10.0 * k,
        "memory_mib": 300,
        **(
            {
                "valid_loss": 2 / k,
                "macro_f1": k / 10,
                "macro_f1_thresholds": k / 9,
                "class_f1": [c / 28 / k for c in range(28)],
            }
            if k % 2
            else {}
        ),
    }
    for k in range(1, 6)
]
EXPECTED = {
    "loss/train": [(k, 1 / k) for k in range(1, 6)],
    "macro F1/valid at 0.5": [(1, 0.1), (3, 0.3), (5, 0.5)],
    "macro F1/valid with thresholds": [(1, 1 / 9), (3, 3 / 9), (5, 5 / 9)],
    "speed/images per second": [(k, 10 * k) for k in range(1, 6)],
    "memory/MiB": [(k, 300) for k in range(1, 6)],
    f"F1 of a class at 0.5/{CLASS_NAMES[15]}": [(1, 15 / 28), (3, 15 / 28 / 3), (5, 15 / 28 / 5)],
}


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    folder = Layout(tmp_path / "work").run("demo", 0)
    folder.mkdir(parents=True)
    return Tracked(tmp_path / "work", folder, "demo fold 0", {"alpha": 0.9, "fold": 0, "buffers": [16]})


# --- what each tracker has, read with its own package -----------------------------------------------------


def read_tensorboard(tracked) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((tracked.folder / "tensorboard").iterdir())) == 1  # for readers that ignore restarts
    reader = EventAccumulator(str(tracked.folder / "tensorboard"))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def read_mlflow(tracked) -> dict:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tracked.work / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("work").experiment_id])
    assert run.info.run_name == "demo fold 0" and run.info.status == "FINISHED"
    assert run.data.params == {"alpha": "0.9", "fold": "0", "buffers": "[16]"}
    return {
        name.replace("and", "&"): [
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
    }


def read_wandb(tracked) -> dict:
    (file,) = (tracked.folder / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(200):  # its service process writes the end a little after `finish`
        records = wandb_records(file.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.05)
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "run":
            assert record.run.display_name == "demo fold 0" and record.run.run_id == id_of(tracked)
        for item in record.history.item:
            if not item.nested_key[0].startswith("_"):
                found.setdefault(item.nested_key[0], []).append((record.history.step.num, json.loads(item.value_json)))
    return found


def wandb_records(content: bytes) -> list:
    """Return the records of an offline run: a log in LevelDB's format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, part, records = 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(part))
            part = b""
    return records


def id_of(tracked) -> str:
    return (tracked.folder / "wandb" / "id.txt").read_text()


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_training_that_was_stopped_and_resumed_has_every_epoch_once(name, tracked):
    pytest.importorskip(TRACKERS[name].module, reason=f"{name} is not installed")
    with tracking([name], tracked, []) as note:
        for row in ROWS[:4]:
            note(row)
    with tracking([name], tracked, ROWS[:2]) as note:  # its last checkpoint was two epochs old
        for row in ROWS[2:]:
            note(row)
    found = READERS[name](tracked)
    for key, points in EXPECTED.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points]
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in points])
    assert len(found) == 8 + 28


@pytest.mark.parametrize("name", TRACKERS)
def test_a_finished_fold_is_recorded_from_its_log_once(name, tracked):
    pytest.importorskip(TRACKERS[name].module, reason=f"{name} is not installed")
    layout = Layout(tracked.work)
    track_finished([name], layout, [("demo", 0)])
    assert not (tracked.folder / TRACKERS[name].mark).exists()  # it has no log
    (tracked.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    track_finished([name], layout, [("demo", 0)])
    before = sorted(tracked.work.rglob("*"))
    track_finished([name], layout, [("demo", 0)])
    assert sorted(tracked.work.rglob("*")) == before and (tracked.folder / TRACKERS[name].mark).exists()


def test_two_trainings_are_recorded_side_by_side(tracked):
    pytest.importorskip("wandb")
    other = Tracked(tracked.work, tracked.folder.with_name("fold1"), "demo fold 1", {})
    other.folder.mkdir()
    with tracking(["wandb"], tracked, []) as note, tracking(["wandb"], other, []) as other_note:
        note(ROWS[0])
        other_note(ROWS[1])
    assert read_wandb(tracked)["loss/train"] == [(1, 1.0)] and id_of(tracked) != id_of(other)


# --- failures ----------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def failing(when: str, seen: list):
    """Return a tracker that fails when it is opened, logs or closes."""

    def act(what):
        seen.append(what)
        if what == when:
            raise Broken("disk full\nmore")

    def start(tracked):
        act("open")
        return Opened(lambda values, epoch: act("log"), lambda: act("close"))

    return Tracker("x", "sys", start, "x")


@pytest.mark.parametrize(("when", "calls"), [("open", 1), ("log", 2), ("close", 5)])
def test_a_tracker_that_fails_is_one_warning(monkeypatch, capsys, tracked, when, calls):
    seen, fine = [], []
    monkeypatch.setitem(TRACKERS, "broken", failing(when, seen))
    monkeypatch.setitem(TRACKERS, "fine", failing("never", fine))
    with tracking(["broken", "fine"], tracked, ROWS[:1]) as note:
        for row in ROWS[1:3]:
            note(row)
    err = capsys.readouterr().err
    assert err == ("warning: demo fold 0: broken no longer records this training (disk full); training continues\n")
    assert len(seen) == calls and fine == ["open", "log", "log", "log", "close"]


def test_one_that_does_not_end_is_left_behind(monkeypatch, capsys, tracked):
    monkeypatch.setattr(trackers, "SECONDS_TO_CLOSE", 0.05)
    stuck = Tracker("x", "sys", lambda tracked: Opened(lambda values, epoch: None, lambda: time.sleep(2)), "x")
    monkeypatch.setitem(TRACKERS, "stuck", stuck)
    started = time.monotonic()
    with tracking(["stuck"], tracked, ROWS):
        pass
    assert time.monotonic() - started < 1 and "(its end took more than 0.05 s)" in capsys.readouterr().err


def test_an_error_of_the_training_passes_through_and_trackers_are_closed(monkeypatch, tracked):
    seen = []
    monkeypatch.setitem(TRACKERS, "fine", failing("never", seen))
    with pytest.raises(KeyboardInterrupt), tracking(["fine"], tracked, []):
        raise KeyboardInterrupt
    assert seen == ["open", "close"]


def test_packages_that_are_missing_are_named_together(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; run: pip install tensorboard wandb"):
        check_trackers(["tensorboard", "wandb"])
    monkeypatch.undo()
    check_trackers(["tensorboard"])


def test_a_server_that_does_not_answer_is_one_warning(monkeypatch, capsys, tracked):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    with tracking(["mlflow"], tracked, ROWS):
        pass
    assert capsys.readouterr().err.count("warning: demo fold 0: mlflow no longer records") == 1


# --- the table and the command line ------------------------------------------------------------------------


def test_the_command_line_knows_the_table():
    assert tuple(TRACKERS) == command_line.TRACKERS


def test_names_on_the_command_line():
    parser = command_line.Parser("")
    command_line.add_tracking_flags(parser)
    assert parser.parse_args([]).track == []
    assert parser.parse_args(["--tensorboard", "--track", "mlflow,wandb"]).track == ["tensorboard", "mlflow", "wandb"]
    assert parser.parse_args(["--track", "wandb"]).track == ["wandb"] and parser.parse_args([]).track == []
    with pytest.raises(SystemExit):
        parser.parse_args(["--track", "wandbb"])
