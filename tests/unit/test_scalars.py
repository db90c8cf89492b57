import json
import sys

import pytest

from common.errors import UserError
from common.train.tensorboard import scalars, summary_writer, write_finished

ROWS = [
    {
        "epoch": k,
        "cycle": 1,
        "learning_rate": 0.1 / k,
        "train_loss": 1 / k,
        "seconds": 2.0,
        **({"valid_loss": 2 / k, "macro_f1": k / 10} if k % 2 else {}),
    }
    for k in range(1, 6)
]


def events(folder) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {
        name: [(event.step, round(event.value, 5)) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }


def test_a_training_that_was_stopped_and_went_on_has_every_step_once(tmp_path):
    with scalars(tmp_path, []) as note:
        for row in ROWS[:4]:
            note(row)
    with scalars(tmp_path, ROWS[:2]) as note:  # its last checkpoint was two epochs old
        for row in ROWS[2:]:
            note(row)
    found = events(tmp_path)
    assert found["loss/train"] == [(k, round(1 / k, 5)) for k in range(1, 6)]
    assert found["macro F1/valid at 0.5"] == [(1, 0.1), (3, 0.3), (5, 0.5)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # for readers that ignore restarts


def test_a_finished_fold_is_written_from_its_log_once(tmp_path):
    write_finished(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_finished(tmp_path)
    assert len(events(tmp_path)["learning rate/last group"]) == 5
    before = list((tmp_path / "tensorboard").iterdir())
    write_finished(tmp_path)
    assert list((tmp_path / "tensorboard").iterdir()) == before


def test_the_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="run: pip install tensorboard"):
        summary_writer()
