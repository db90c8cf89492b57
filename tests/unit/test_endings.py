"""How a process ends: on every signal, with the true cause of an error, with closed output, with damaged files."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from common.artifacts.files import naming, write_text
from common.artifacts.layout import Layout
from common.artifacts.predictions import save_predictions
from common.artifacts.stage import Record, Stage, sidecar
from common.errors import UserError
from common.process import stopping
from common.process.main import explain, kill_child, run
from common.score.members import check_origin
from common.train.checkpoints import load_checkpoint, save_checkpoint
from tests.conftest import ROOT

# --- signals -----------------------------------------------------------------------------------------------


@pytest.fixture
def listening(monkeypatch):
    """Make this process listen to signals as a stage does, until the test ends."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping.STATE.asked = 0


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_every_signal_lets_a_training_save_first(listening, capsys, number):
    def main():
        with stopping.held():
            os.kill(os.getpid(), number)
            print("saved")

    with pytest.raises(stopping.Stopped), stopping.held():
        os.kill(os.getpid(), number)
        assert stopping.STATE.asked == number
    with pytest.raises(SystemExit) as stop:
        run(main)
    out, err = capsys.readouterr()
    assert stop.value.code == 128 + number and out == "saved\n" and "stopped; finished work is kept" in err


def test_ctrl_c_outside_of_a_training_and_a_second_one_inside_end_at_once(listening):
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopping.held():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    others = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.listen()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for number, handler in others.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGHUP, before)


# --- causes ------------------------------------------------------------------------------------------------


def hidden(outer, inner, cause=False):
    """Return an error that hides another one."""
    try:
        try:
            raise inner
        except type(inner) as error:
            if cause:
                raise outer from error
            raise outer  # noqa: B904
    except type(outer) as error:
        return error


FULL = OSError(28, "No space left on device", "last.pt")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hidden(RuntimeError("unexpected pos 64 vs 0"), FULL), "No space left on device: last.pt; check that"),
        (
            hidden(RuntimeError("unexpected pos 64 vs 0"), FULL, cause=True),
            "No space left on device: last.pt; check that",
        ),
        (hidden(ValueError("a"), UserError("give another file")), "give another file"),
        (hidden(TypeError("a bug"), FULL), None),  # this project's own bug: a traceback
        (OSError(28, "No space left on device"), "No space left on device; check that"),
        (OSError(5, "Input/output error", "a.tif"), "Input/output error: a.tif; check that"),
        (OSError("of a library"), None),
        (ConnectionResetError(104, "Connection reset by peer"), "a connection to another process or machine was lost"),
        (TimeoutError(110, "timed out"), "a connection to another process or machine was lost"),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\n"
                "unable to allocate shared memory(shm) for file </torch_1>"
            ),
            "/dev/shm, where loader processes put batches, is full; finished work is kept: make it larger",
        ),
        (
            ImportError("libtorch_cuda.so: failed to map segment from shared object"),
            "out of memory while loading a library (libtorch_cuda.so",
        ),
        (ImportError("No module named 'x'"), None),
        (EOFError("unexpected EOF"), "a worker process was killed"),  # the one that starts loader processes
        (EOFError("of a file"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_the_cause_that_is_told_is_the_true_one(error, message):
    found = explain(error)
    assert found is None if message is None else found.startswith(message), found


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1"),
        type("DistBackendError", (RuntimeError,), {})("NCCL communicator was aborted"),
    ],
)
def test_a_lost_process_of_torchrun_is_one_message(monkeypatch, error):
    assert explain(error) is None
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["04_train.py", "--folds", "0"])
    assert explain(error) == (
        "another of torchrun's 2 processes was lost (perhaps memory ran out); finished work is kept. To resume: "
        "torchrun --nproc-per-node 2 04_train.py --folds 0"
    )


def test_the_file_of_a_full_disk_is_named_also_where_another_error_hides_it(tmp_path):
    with pytest.raises(RuntimeError) as error, naming(tmp_path / "last.pt"):
        raise hidden(RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device"))
    assert explain(error.value).startswith(f"No space left on device: {tmp_path / 'last.pt'}; ")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_output_is_no_error(tmp_path, closed):
    code = (
        "import sys; from common.process.main import run\n"
        "def main():\n    print('out'); print('err', file=sys.stderr); open('made', 'w').write('whole')\n"
        "run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: [os.close(number) for number in closed],
    )
    assert process.wait() == 0 and (tmp_path / "made").read_text() == "whole"


# --- damage ------------------------------------------------------------------------------------------------


def test_one_byte_of_a_checkpoint_that_changed_is_noticed_before_it_is_used(tmp_path):
    path, weights = tmp_path / "last.pt", torch.arange(1000.0)
    save_checkpoint(path, {"model": {"a": weights}})
    data = path.read_bytes()
    place = data.index(weights.numpy().tobytes()) + 400
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["a"], weights)  # torch itself does not check
    with pytest.raises(UserError, match="last.pt is not a readable checkpoint .its part .*data/0 is damaged."):
        load_checkpoint(path)


@pytest.fixture
def predicted(tmp_path):
    """A work folder with the out-of-fold predictions of one fold, and the record of its training."""
    write_text(tmp_path / "folds.csv", "Id,Target,part,group,fold,copies\na,0,train,a,0,1\n")
    network = tmp_path / "runs" / "demo" / "fold0" / "best.pt"
    write_text(network, "a network")
    Stage("04_train", network, {}, {"folds.csv": tmp_path / "folds.csv"}).seal(Record(1))
    path = Layout(tmp_path).predictions("demo", "oof")
    save_predictions(path, ["a"], np.full((1, 28), 0.5))
    Stage("05_predict_oof", path, {"folds": [0]}, {}).seal(Record(1))
    check_origin(tmp_path, ["demo"], "oof")
    return tmp_path, path


def test_predictions_that_were_edited_are_refused(predicted):
    work, path = predicted
    save_predictions(path, ["a"], np.full((1, 28), 0.6))
    with pytest.raises(
        UserError,
        match=rf"is not the file that stage 05 wrote; run: python 05_predict_oof.py --work {work} --recipes demo",
    ):
        check_origin(work, ["demo"], "oof")


def test_predictions_without_a_record_are_refused(predicted):
    work, path = predicted
    sidecar(path).unlink()
    with pytest.raises(UserError, match="has no record of what it was made from"):
        check_origin(work, ["demo"], "oof")


def test_predictions_of_other_folds_or_labels_are_refused(predicted):
    work, _ = predicted
    folds = pd.read_csv(work / "folds.csv")
    folds.assign(Target=1).to_csv(work / "folds.csv", index=False)
    with pytest.raises(
        UserError, match=r"trained on another .*folds.csv.*best.pt; run: python 04_train.py .* --folds 0 --force, then"
    ):
        check_origin(work, ["demo"], "oof")
    shutil.rmtree(work / "runs")  # nobody can tell now; the file is still what stage 05 wrote
    check_origin(work, ["demo"], "oof")
    assert json.loads(sidecar(Layout(work).predictions("demo", "oof")).read_text())["parameters"] == {"folds": [0]}


def test_only_children_of_this_process_are_killed():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    kill_child(child.pid)
    assert child.wait(10) == -signal.SIGKILL
    for other in (1, os.getppid(), child.pid):  # strangers, and a number that is free again
        kill_child(other)
