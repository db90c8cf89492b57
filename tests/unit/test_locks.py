"""One process at a time makes a thing; others are told who; the killed hold nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from common import locks
from common.errors import UserError
from common.locks import Lock, is_gone, read_record
from tests.conftest import ROOT

@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_OF_GRACE", 0)


HOLD = """
import sys, time
from pathlib import Path
from common.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`/thing."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "thing")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_it_since_when_and_what_to_do(holder, tmp_path):
    with pytest.raises(UserError) as error:
        Lock(tmp_path / "thing")
    assert re.fullmatch(rf"{tmp_path}/thing is being made by \S+ on \S+, process {holder.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d "
                        r"[+-]\d{4}: python -c \S+\nwait for its end, or stop it there, and run this again; or give another "
                        "--work", str(error.value))
    with Lock(tmp_path / "other"):
        pass


def test_a_killed_holder_blocks_nobody(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert is_gone(read_record(tmp_path / ".thing.lock.json"))
    started = time.monotonic()
    with Lock(tmp_path / "thing"):
        assert read_record(tmp_path / ".thing.lock.json")["pid"] == str(os.getpid())
    assert time.monotonic() - started < 5 and not (tmp_path / ".thing.lock.json").exists()


def test_who_may_wait_gets_it_when_the_other_ends(holder, tmp_path, capsys):
    command = HOLD.replace('(Path(sys.argv[1]))', '(Path(sys.argv[1]), wait=True)').replace("time.sleep(60)", "")
    waiting = subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "thing")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert waiting.stdout.readline().startswith(f"waiting: {tmp_path}/thing is being made by ")
    holder.kill()
    assert waiting.communicate(timeout=20)[0] == "held\n"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"pid": {"a": 1}, "host": 3}', '{"pid": "-1"}', '{"pid": 99999999999999999999}'])
def test_a_damaged_record_is_no_more_than_a_poor_message(holder, tmp_path, text):
    (tmp_path / ".thing.lock.json").write_text(text)
    with pytest.raises(UserError, match="thing is being made by "):
        Lock(tmp_path / "thing")


def test_a_pid_of_another_machine_says_nothing(tmp_path):
    record = {"user": "a", "host": "elsewhere", "pid": "1", "since": "", "command": ""}
    assert not is_gone(record)
    (tmp_path / "r").write_text(json.dumps(record))
    assert read_record(tmp_path / "r") == record


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/thing cannot be made: .*file cannot be written to .*or give another --work"):
        Lock(tmp_path / "file" / "thing")
