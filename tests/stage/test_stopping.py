"""Ctrl+C and SIGTERM while stages work: a checkpoint, one message with the command to resume, and no traceback."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from common.artifacts.stage import sidecar
from tests.conftest import ROOT

RECIPE = "demo-quick"
TINY = ("--set", "cycle_epochs=300", "max_cycles=1", "buffers=16", "finder=off", "evaluate_epochs=1")
ENVIRONMENT = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def stopped(command, number, when, whole_group, seconds=60):
    """Start a command and send it a signal once its output contains all of `when`.

    Returns the exit code, the output, and the seconds from the signal to the end.
    """
    missing = set(when)
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a parent may ignore it
    lines = []
    for line in process.stdout:
        lines.append(line)
        missing -= {text for text in missing if text in line}
        if not missing:
            break
    started = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    lines.append(process.communicate(timeout=seconds)[0])
    return process.returncode, "".join(lines), time.monotonic() - started


@pytest.fixture
def work(run_script, small_data, tmp_path):
    places = ("--data", small_data, "--work", tmp_path / "work")
    run_script("01_preprocess.py", *places, "--recipes", RECIPE)
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)
    return tmp_path / "work"


def train(work, *more):
    return (sys.executable, "04_train.py", "--work", work, "--recipe", RECIPE, *TINY, *more)


def test_a_preempted_job_saves_each_fold_and_goes_on(work):
    for whole_group in (True, False):
        code, output, _ = stopped(
            train(work, "--jobs", "2"), signal.SIGTERM, ("fold 0: epoch", "fold 1: epoch"), whole_group
        )
        assert code == 143 and "Traceback" not in output, output
        assert output.count("saved in epoch") == 2
        assert (
            f"stopped; finished work is kept. To resume: python 04_train.py --work {work} --recipe demo-quick" in output
        )
        assert all((work / "runs" / RECIPE / f"fold{fold}" / "last.pt").is_file() for fold in (0, 1))
    assert output.count("resuming at epoch") == 2
    assert not sidecar(work / "runs" / RECIPE / "fold0" / "best.pt").exists()


def test_the_command_that_goes_on_does_not_throw_away_again(work):
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        code, output, _ = stopped(
            train(work, "--folds", "0", "--force", "--workers", "1"), number, ["epoch 2/300"], whole_group=True
        )
        assert code == 128 + number and "saved in epoch" in output and "Traceback" not in output, output
        assert "To resume: python 04_train.py" in output and "--folds 0 --workers 1\n" in output, output
    goes_on = output.rpartition("To resume: python ")[2].split()
    assert "resuming at epoch" in stopped((sys.executable, *goes_on), signal.SIGTERM, ["resuming"], whole_group=True)[1]


def test_torchruns_main_process_saves(work):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    code, output, _ = stopped(
        (*launcher, *train(work, "--folds", "0")[1:]), signal.SIGTERM, ["epoch 2/300"], whole_group=False
    )
    assert code != 0 and output.count("saved in epoch") == 1
    assert "To resume: torchrun --nproc-per-node 2" in output
    assert (work / "runs" / RECIPE / "fold0" / "last.pt").is_file()
    assert "RuntimeError" not in output, output  # from the other process, which loses the main one


@pytest.mark.parametrize(
    ("when", "number", "code"),
    [
        ("01_preprocess: ", signal.SIGINT, 130),
        ("epoch 1/300", signal.SIGINT, 130),
        ("epoch 1/300", signal.SIGTERM, 143),
    ],
)
def test_run_all_names_itself(small_data, tmp_path, when, number, code):
    flags = [
        "--data",
        small_data,
        "--work",
        tmp_path / "my work",
        "--quick",
        "--recipes",
        "demo",
        "--set",
        "cycle_epochs=300",
        "--set",
        "max_cycles=1",
        "--set",
        "evaluate_epochs=1",
    ]
    found, output, seconds = stopped(
        ["bash", "run_all.sh", *flags], number, [when], whole_group=number == signal.SIGINT
    )
    assert found == code and "Traceback" not in output, output
    assert output.count("To resume: ") == 1
    assert (
        f"To resume: bash run_all.sh --data {small_data} --work {shlex.quote(str(tmp_path / 'my work'))} --quick"
        in output
    )
    assert seconds < 20  # a few seconds on a quiet machine


SLOW_TO_SAVE = """
import os, signal, time
from common.process import stopping
from common.process.main import run
from common.process.parallel import run_jobs

def work(seconds_to_save):
    if seconds_to_save is None:  # done at once: its process waits for more jobs
        return
    with stopping.held():
        os.write(1, b"begun\\n")  # in one piece, as other processes write too
        while not stopping.STATE.asked:
            time.sleep(0.01)
        time.sleep(seconds_to_save)
        os.write(1, b"saved\\n")

run(lambda: run_jobs(work, [(None,), (3,), (0,), (2,)], 3, None, "jobs"))
"""


@pytest.mark.parametrize("whole_group", [True, False])
def test_whoever_has_saved_does_not_take_others_with_it(whole_group):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_SAVE],
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun = [process.stdout.readline() for _ in range(3)]
    assert begun == ["begun\n"] * 3
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 143 and output.count("saved") == 3 and "Traceback" not in output, output


def test_a_worker_that_is_told_to_end_alone_does_not_pass_for_done():
    code = SLOW_TO_SAVE.replace("while not", "os.kill(os.getpid(), signal.SIGTERM)\n        while not")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and "saved" in result.stdout, result.stdout + result.stderr
    assert "error: jobs: a worker process was killed (perhaps memory ran out); finished work is kept" in result.stderr


def test_sigterm_after_the_last_job_does_not_wait_for_idle_workers():
    code = (
        "import os, signal, time; from common.process.main import run; from common.process.parallel import run_jobs\n"
        "def main():\n    run_jobs(abs, [(1,), (2,)], 2, None, 'jobs')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
        "run(main)"
    )
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 143 and time.monotonic() - started < 15, result.stdout + result.stderr


def test_a_thread_that_loses_the_other_end_says_nothing_and_other_errors_are_told():
    code = (
        "import sys, threading; from common.process.main import run\n"
        "def fail(error):\n    try:\n        raise error\n    except Exception:\n"
        "        sys.excepthook(*sys.exc_info())\n"
        "def main():\n    for error in (ConnectionResetError('gone'), EOFError('ended'), ValueError('a bug')):\n"
        "        thread = threading.Thread(target=fail, args=(error,)); thread.start(); thread.join()\n"
        "run(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stderr.count("Traceback") == 1 and "ValueError: a bug" in result.stderr, (
        result.stderr
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_idle_worker_processes_are_ended_without_a_word(number):
    code = (
        "import os, signal, time; from common.process.main import run\n"
        "from common.process.parallel import run_parallel\n"
        "def main():\n    list(run_parallel(abs, [(1,), (2,)], 2, 'jobs'))\n"
        f"    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)\nrun(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert result.returncode == 128 + number
    assert result.stderr == "\nstopped; finished work is kept. To resume: python -c\n"


def test_worker_processes_never_see_ctrl_c():
    code = (
        "import signal; from common.process.parallel import run_parallel\n"
        "for _, blocked in run_parallel(signal.pthread_sigmask, [(signal.SIG_BLOCK, [])] * 2, 2, 'jobs'):\n"
        "    print(signal.SIGINT in blocked)\n"
        "print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == ["True", "True", "False"], result.stdout + result.stderr


LOADING = """
import os, time
from contextlib import nullcontext
from common.process import stopping
from common.process.main import run

class Slow:
    def __len__(self):
        return 1000

    def __getitem__(self, i):
        time.sleep(0.05)
        return i

def main():
    from common.train.dataset import Loader, begin_loading

    def begin(worker):
        time.sleep(SECONDS)
        begin_loading(worker)

    with stopping.HELD:
        batches = iter(Loader(Slow(), num_workers=2, worker_init_fn=begin))
        os.write(1, b"begun\\n")
        for i, _ in enumerate(batches):
            if i > 20:
                os.write(1, b"saved\\n")
                stopping.check()

run(main)
"""


@pytest.mark.parametrize("whole_group", [True, False])
def test_loaders_have_nothing_to_save_and_are_not_waited_for(whole_group):
    command = [sys.executable, "-c", LOADING.replace("SECONDS", "0").replace("stopping.HELD", "nullcontext()")]
    code, output, seconds = stopped(command, signal.SIGTERM, ("begun",), whole_group)
    assert code == 143 and seconds < 15 and "To resume: " in output and "Traceback" not in output, output


def test_loaders_that_have_just_begun_are_there_until_all_is_saved():
    command = [sys.executable, "-c", LOADING.replace("SECONDS", "2").replace("HELD", "held()")]
    code, output, _ = stopped(command, signal.SIGTERM, ("begun",), whole_group=True)
    assert code == 143 and "saved" in output and "To resume: " in output and "Traceback" not in output, output


def test_loaders_that_have_just_begun_say_nothing_of_ctrl_c():
    slow_fork = (
        "import multiprocessing.util as u, time\n"
        "u.register_after_fork(u.register_after_fork, lambda _: time.sleep(2))\n"
    )
    command = [
        sys.executable,
        "-c",
        slow_fork + LOADING.replace("SECONDS", "0").replace("stopping.HELD", "nullcontext()"),
    ]
    code, output, _ = stopped(command, signal.SIGINT, ("begun",), whole_group=True)
    assert code in (130, -2) and output.count("To resume: ") == 1 and "Traceback" not in output, output


def test_a_forked_process_ends_without_a_word():
    code = (
        "import os, multiprocessing as m, time; from common.process import stopping; stopping.listen(); "
        "child = m.get_context('fork').Process(target=time.sleep, args=(60,)); child.start(); time.sleep(0.5); "
        "child.terminate(); child.join(); print(child.exitcode)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.stderr) == ("143", "")
