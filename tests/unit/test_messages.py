"""What a user needs from each message: the file, what was expected and found, and the command that cures it.

Only these parts are asserted, not whole sentences. The exception is the message after a signal, STOPPED.
"""

import argparse
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pandas as pd
import pytest
import tifffile

from common.artifacts import text_tables
from common.artifacts.files import read_json, write_json, write_text
from common.artifacts.predictions import check_probabilities, load_predictions
from common.artifacts.stage import Record, Stage, read_sidecar
from common.artifacts.tables import read_table
from common.data.folds import make_folds
from common.data.ingest import refuse_bad
from common.data.labels import parse_targets, read_csv, read_labels
from common.data.samples import Sample
from common.data.sources import BadImage, read_channel
from common.errors import UserError
from common.process import command_line, parallel, stopping
from common.process.main import run
from common.process.parallel import run_parallel, workers
from common.recipes import get_recipe
from common.score.members import check_there, labelled_rows, read_groups
from common.score.thresholds import repeated_folds
from common.train.hardware import HardwareOptions, choose_hardware
from tests.conftest import ROOT

STOPPED = "stopped; finished work is kept. To resume: "
RESUME = "To resume: python 04_train.py --jobs 2"


def assert_says(message, *parts):
    """Check that a message has all parts."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"missing: {missing} in: {message}"


def kept(n):
    """Return a table like stage 02's with n samples."""
    ids = [f"s{i}" for i in range(n)]
    return pd.DataFrame({"Id": ids, "part": "train", "Target": "0", "group": ids, "kept": 1})


def written(path, text):
    write_text(path, text)
    return path


def tiff(path, image, **more):
    tifffile.imwrite(path, image, **more)
    return path


def other_classes(path):
    np.savez(path, ids=np.array(["a"]), probs=np.zeros((1, 28), np.float32), classes=np.array(["x", "y"]))
    return path


@pytest.mark.parametrize(
    ("do", "parts"),
    [
        (
            lambda f: check_probabilities(["a"], np.full((1, 28), 2.0), "p.npz"),
            ["p.npz", "[0, 1]", "1 rows", "\n  a: 2 for Nucleoplasm"],
        ),
        (lambda f: load_predictions(other_classes(f / "p.npz"), "CURE"), ["{f}/p.npz", "other classes", "run: CURE"]),
        (
            lambda f: read_json(written(f / "x.json", "{")),
            ["{f}/x.json", "not valid JSON", "line 1 column 2", "delete it", "run its stage again"],
        ),
        (
            lambda f: read_sidecar(written(f / "x.meta.json", '{"outputs": []}').with_name("x")),
            ["{f}/x.meta.json", "delete it", "run its stage again"],
        ),
        (
            lambda f: read_table(written(f / "x.csv", ""), "CURE"),
            ["{f}/x.csv is empty", "names of columns", "delete it and run: CURE"],
        ),
        (
            lambda f: read_table(written(f / "folds.csv", "Id,Target,part,group,fold\na,0,train,a,0\n"), "CURE"),
            ["{f}/folds.csv", "no column copies", "delete it and run: CURE"],
        ),
        (
            lambda f: read_table(written(f / "samples.csv", "Id,part,Target,side\na,train,0,x\n"), "CURE"),
            ["{f}/samples.csv", "column side", "whole numbers", "line 2: 'x'", "delete it and run: CURE"],
        ),
        (
            lambda f: read_labels(written(f / "x.csv", "Id,Target" + 10**4 * "," + "\na,0\n")),
            ["{f}/x.csv", "over 10000 characters", "names of a few columns"],
        ),
        (
            lambda f: read_labels(written(f / "x.csv", 'Id,"Target\n' + 10**4 * "," + '"\na,0\n')),
            ["{f}/x.csv", "over 10000 characters", "names of a few columns"],
        ),
        (
            lambda f: read_labels(written(f / "x.csv", "Id,Target,Target\na,0,1\n")),
            ["{f}/x.csv", "'Target' 2 times", "expected once"],
        ),
        (
            lambda f: read_groups(written(f / "g.csv", "Id,group\na,\nb,x\n"), np.array(["a", "b"])),
            ["{f}/g.csv", "no group", "1 Ids", "\n  a"],
        ),
        (
            lambda f: get_recipe("demo", ["pooling=own"]),
            ["pooling 'own'", "encoder 'resnet10_narrow'", "gapnet_pl and gapnet_pl_plus need pooling=own"],
        ),
        (
            lambda f: get_recipe("demo_large", ["size_rule=by-source", "crop_size=1024"]),
            ["256 px", "192 px", "size_rule=by-source", "smaller crop_size"],
        ),
        (lambda f: get_recipe("demo", ["focal_gamma=inf"]), ["focal_gamma", "impossible value: inf"]),
        (lambda f: get_recipe("demo", ["learning_rates=0.1,inf"]), ["learning_rates", "impossible value: (0.1, inf)"]),
        (
            lambda f: choose_hardware(HardwareOptions("meta", "fp32", 0)),
            ["device 'meta'", "neither a CPU nor a CUDA GPU", "--device cpu"],
        ),
        (
            lambda f: make_folds(kept(9), 2, 1, 0, hold_out=0.05),
            ["--hold-out 0.05", "9 distinct samples", "larger share"],
        ),
        (lambda f: make_folds(kept(200), 2, 1, 0, hold_out=1e-320), ["--hold-out 9.99989e-321", "smallest", "0.01"]),
        (lambda f: check_there([f / "oof.npz"], "CURE"), ["{f}/oof.npz is missing; run: CURE"]),
        (lambda f: check_there([f / "a.csv"], None), ["{f}/a.csv is missing", "expected", ".npz, .csv or .npy"]),
        (
            lambda f: read_table(written(f / "x.csv", "Id\n../a\n"), "CURE"),
            ["{f}/x.csv", "not plain file names", "\n  '../a'"],
        ),
        (
            lambda f: read_csv(written(f / "x.csv", "Id,Predicted\n"), "Predicted"),
            ["{f}/x.csv", "no rows", "expected one per sample"],
        ),
        (
            lambda f: read_labels(written(f / "x.csv", "Id,Target\na,28\n")),
            ["{f}/x.csv", "Target", "labels 0 to 27 separated by spaces", "\n  a: '28'"],
        ),
        (lambda f: parse_targets(["0", "-1"]), ["labels 0 to 27 separated by spaces", "\n  '-1'"]),
        (
            lambda f: refuse_bad([Sample("a", "train", "0", fault="a_red is bad")], f / "bad.csv"),
            ["1 samples cannot be used", "{f}/bad.csv", "\n  a_red is bad", "run this again", "--keep-going"],
        ),
        (
            lambda f: labelled_rows(pd.DataFrame({"Id": ["a"]}), ["a", "b"], "CURE"),
            ["the predictions", "folds.csv", "run: CURE", "\n  b"],
        ),
        (
            lambda f: repeated_folds(np.ones((2, 28), bool), np.array(["g", "g"])),
            ["2 samples in 1 groups", "at least 2 groups"],
        ),
        (lambda f: command_line.names("a,a"), ["expected distinct names separated by commas", "found 'a,a'"]),
        (lambda f: command_line.positive("0"), ["expected a whole number above 0", "found '0'"]),
        (lambda f: command_line.fold_numbers("0,x"), ["expected fold numbers", "commas", "0,2", "found '0,x'"]),
        (
            lambda f: read_channel(tiff(f / "a.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb"), "red"),
            ["colour image", "expected one grey channel"],
        ),
        (
            lambda f: read_channel(
                tiff(f / "a.tif", np.zeros((8, 8, 4), np.uint8), photometric="rgb", extrasamples=["unassalpha"]), "red"
            ),
            ["alpha channel", "save it without"],
        ),
        (
            lambda f: read_channel(tiff(f / "a.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack"), "red"),
            ["3 pages", "expected one channel"],
        ),
        (
            lambda f: read_channel(tiff(f / "a.tif", np.zeros((8, 8), np.float32)), "red"),
            ["float32", "expected unsigned integers", "16 bits"],
        ),
    ],
)
def test_an_error_names_the_file_what_was_expected_and_found_and_the_cure(tmp_path, do, parts):
    with pytest.raises((UserError, BadImage, argparse.ArgumentTypeError)) as error:
        do(tmp_path)
    assert_says(str(error.value), *(part.replace("{f}", str(tmp_path)) for part in parts))


WHOLE_ABOVE_0 = "expected a whole number above 0"


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        ("02_dedup.py", ["--threshold", "65"], ["one or three distances from 0 to 64", "found '65'"]),
        ("02_dedup.py", ["--threshold", "1,2"], ["one or three distances from 0 to 64", "found '1,2'"]),
        ("03_make_folds.py", ["--n-folds", "1"], ["at least 2"]),
        ("03_make_folds.py", ["--max-copies", "0"], ["at least 1"]),
        ("03_make_folds.py", ["--hold-out", "0.6"], ["from 0 to 0.5"]),
        ("03_make_folds.py", ["--seed", "-1"], ["expected a whole number from 0 to 4294967295", "found '-1'"]),
        ("01_preprocess.py", ["--white-level", "70000"], ["expected a whole number from 1 to 65535", "found '70000'"]),
        ("01_preprocess.py", ["--black-level", "4095", "--white-level", "4095"], ["below --white-level 4095"]),
        ("common/check/__main__.py", ["--n-folds", "1"], ["expected a whole number above 1", "found '1'"]),
        ("03_make_folds.py", ["--work", ""], ["expected a folder", "found nothing"]),
        ("01_preprocess.py", ["--jobs", "0"], [WHOLE_ABOVE_0, "found '0'"]),
        ("02_dedup.py", ["--jobs", "-2"], [WHOLE_ABOVE_0, "found '-2'"]),
        ("04_train.py", ["--jobs", "x"], [WHOLE_ABOVE_0, "found 'x'"]),
        ("05_predict_oof.py", ["--workers", "-1"], ["expected a whole number from 0 to 4294967295", "found '-1'"]),
    ],
)
def test_an_impossible_flag_is_one_line_that_names_it(monkeypatch, capsys, script, arguments, parts):
    monkeypatch.setattr(sys, "argv", [script, *arguments])  # stage 01 reads it itself
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script))["parse_args"]()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert_says(message, arguments[0], *parts)


OUT_OF_MEMORY = ["finished work is kept", "--micro-batch", "smaller crop", "smaller network"]


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(28, "No space left on device", "x.csv"), ["No space left on device: x.csv", "has space"]),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            ["(pid 7) is killed", "memory", "finished work is kept", RESUME, "fewer --workers"],
        ),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA"),
            ["GPU is out of memory", "nvidia-smi", "finished work is kept", "--device cpu"],
        ),
        (
            BrokenPipeError(32, "Broken pipe"),
            ["worker process was killed", "memory", "finished work is kept", "To resume", "lower --jobs"],
        ),
        (MemoryError("Unable to allocate 3 GiB"), ["out of memory (Unable to allocate 3 GiB)", *OUT_OF_MEMORY]),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory\nmore"),
            ["out of memory ([enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator:", *OUT_OF_MEMORY],
        ),
    ],
)
def test_a_script_that_fails_ends_in_one_line_with_the_cure(monkeypatch, capsys, error, parts):
    code, message = end_of(error, monkeypatch, capsys)
    assert code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert_says(message, *parts)


def test_a_script_that_is_stopped_ends_in_the_command_to_resume(monkeypatch, capsys):
    assert end_of(KeyboardInterrupt(), monkeypatch, capsys) == (130, f"\nstopped; finished work is kept. {RESUME}\n")


def end_of(error, monkeypatch, capsys):
    """Run a `main` that raises an error; return the exit code and what was printed to stderr."""

    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["04_train.py", "--jobs", "2"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (stopping.Stopped, 143)])
def test_a_signal_while_a_module_in_c_is_imported_is_no_traceback(capsys, stop, code):
    def main():
        try:
            raise stop
        except BaseException as error:
            raise ImportError("initialization failed") from error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == code and STOPPED in capsys.readouterr().err


def test_after_sigterm_any_error_is_the_end_that_was_asked_for(capsys, monkeypatch):
    def main():
        monkeypatch.setattr(stopping.STATE, "asked", signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 143 and STOPPED in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_among_the_imports_of_main_is_one_message(tmp_path, number, code):
    (tmp_path / "slow.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{number})\ntime.sleep(9)\n"
    )
    body = "def main():\n    import slow\n"
    end = interrupted(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{body}")
    assert (end.returncode, end.stderr) == (code, f"\n{STOPPED}python -c\n")


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_wait_until_worker_processes_are_begun(number, code):
    body = (
        "import os, signal, time; from common.process import stopping\ndef main():\n    with stopping.held():\n"
        f"        os.kill(os.getpid(), signal.{number}); time.sleep(0.3); print('whole')\n    time.sleep(9)\n"
    )
    end = interrupted(body)
    assert (end.returncode, end.stdout) == (code, "whole\n")
    assert end.stderr.endswith(f"\n{STOPPED}python -c\n")


def interrupted(definitions):
    """Run a `main` that signals itself; Ctrl+C is not ignored, though a parent may ignore it."""
    return subprocess.run(
        [sys.executable, "-c", f"{definitions}\nfrom common.process.main import run\nrun(main)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_when_all_is_done_there_is_nothing_to_stop():
    script = (
        "import atexit, os, signal; from common.process.main import run\n"
        "atexit.register(os.kill, os.getpid(), signal.{})\nrun(lambda: print('done'))"
    )
    for number in ("SIGINT", "SIGTERM"):
        end = subprocess.run([sys.executable, "-c", script.format(number)], cwd=ROOT, capture_output=True, text=True)
        assert (end.returncode, end.stdout, end.stderr) == (0, "done\n", "")


def test_paths_that_are_no_text_can_be_told():
    script = "import os; from common.process.main import run; run(lambda: print(os.fsdecode(b'n\\xff')))"
    end = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (end.returncode, end.stdout) == (0, "n\\udcff\n")


def test_who_reads_the_output_may_leave():
    code = "from common.process.main import run; run(lambda: print('line' * 10 ** 6))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(4)
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")


def test_run_all_and_torchrun_name_their_own_commands(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["04_train.py", "--work", "my work"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line.command() == "torchrun --nproc-per-node 4 04_train.py --work 'my work'"
    monkeypatch.setenv("RUN_ALL_COMMAND", "bash run_all.sh --work x")
    assert command_line.command() == "bash run_all.sh --work x"


def test_a_killed_worker_process_is_one_message(monkeypatch):
    def broken(*_):
        raise BrokenProcessPool
        yield

    monkeypatch.setattr(parallel, "progress", broken)
    with pytest.raises(UserError) as error:
        list(run_parallel(abs, [(1,)], 1, "hashing"))
    assert_says(str(error.value), "hashing: ", "worker process was killed", "finished work is kept", "lower --jobs")


def test_a_cluster_needs_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="--cluster needs dask: pip install distributed"), workers(1, "tcp://x:1"):
        pass


def test_a_csv_file_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_tables, "MAX_BYTES", 10**6)
    path = tmp_path / "train.csv"
    with open(path, "wb") as file:
        file.truncate(2 * 10**6)
    with pytest.raises(UserError, match="train.csv has 2 MB; expected .* at most 1 MB"):
        read_labels(path)


def test_a_stage_names_what_changed_before_training_is_lost(tmp_path):
    from common.classes import CLASS_NAMES
    from common.train.checkpoints import prepare, save_checkpoint
    from common.train.run import FORMAT

    write_json(tmp_path / "in", 1)
    before = Stage("04_train", tmp_path / "best.pt", {"alpha": 0.9}, {"folds.csv": tmp_path / "in"})
    now = Stage("04_train", tmp_path / "best.pt", {"alpha": 0.5}, {"folds.csv": tmp_path / "in"})
    save_checkpoint(
        tmp_path / "last.pt",
        {
            "format": FORMAT,
            "classes": list(CLASS_NAMES),
            "recipe": {},
            "model": {},
            "mean": [0.5] * 4,
            "std": [0.3] * 4,
            "made_from": before.made_from(),
        },
    )
    with pytest.raises(UserError) as error:
        prepare([now], False)
    changed = "alpha was 0.9, now 0.5"
    assert_says(
        str(error.value), f"{tmp_path} ", "unfinished training", changed, "use --force", "--name NAME", "another --work"
    )
    write_text(before.artifact, "network")
    before.seal(Record(1))
    with pytest.raises(UserError) as error:
        prepare([now], False)
    assert_says(
        str(error.value), f"{tmp_path} ", " finished training", changed, "use --force", "--name NAME", "another --work"
    )
    prepare([now], True)
    assert not tmp_path.exists()


def test_ids_and_checksums_of_a_table_stay_text(tmp_path):
    write_text(tmp_path / "96.csv", "Id,crc\n01,00012345\n02,12345678\n")
    assert list(read_table(tmp_path / "96.csv", "")["crc"]) == ["00012345", "12345678"]
    assert pd.api.types.is_string_dtype(read_table(tmp_path / "96.csv", "")["Id"])
