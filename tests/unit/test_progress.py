import os
import pty
import subprocess
import sys
import termios

import pytest

from tests.conftest import ROOT

LOOP = (
    "import common.process.progress as p; p.SECONDS_BETWEEN_LINES = 0\n"
    "for _ in p.progress(iter(range(3)), 3, 'epoch 1/2', 'batches'): pass"
)
WORKERS = (
    "import joblib; from common.process.progress import has_terminal\n"
    "print(joblib.Parallel(2)([joblib.delayed(has_terminal)()] * 2), has_terminal())"
)


def on_a_terminal(code: str, **environment) -> str:
    """Return the output of a process whose streams are a terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=follower, stderr=follower, env={**os.environ, **environment}
    )
    process.wait()
    os.write(follower, b"END")
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(leader, 1000)
    os.close(follower)
    os.close(leader)
    return shown.decode().removesuffix("END")


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)


def test_a_terminal_has_a_bar_that_moves_in_place():
    shown = on_a_terminal(LOOP)
    assert "epoch 1/2" in shown and "\r" in shown.replace("\r\n", "") and "left" not in shown


def test_a_notebook_and_a_log_file_have_lines():
    lines = "epoch 1/2: 1/3 batches, 0 s left\nepoch 1/2: 2/3 batches, 0 s left\n"
    assert on_a_terminal(LOOP, JPY_PARENT_PID="1").replace("\r\n", "\n") == lines
    assert subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, capture_output=True, text=True).stderr == lines


def test_several_workers_do_not_draw_bars_over_each_other():
    assert "[False, False] True" in on_a_terminal(WORKERS)
