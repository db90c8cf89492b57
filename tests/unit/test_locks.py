"""One process at a time makes an output; others learn who makes it; killed processes hold nothing."""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.artifacts import locks
from common.artifacts.locks import Lock, holders, is_gone, read_record, this_process
from common.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_OF_GRACE", 0)


HOLD = """
import sys, time
from pathlib import Path
from common.artifacts.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of `tmp_path`/thing."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "thing")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_it_since_when_and_what_to_do(holder, tmp_path):
    with pytest.raises(UserError) as error:
        Lock(tmp_path / "thing")
    who, cure = str(error.value).split("\n")
    assert re.fullmatch(
        rf"{tmp_path}/thing is being made by \S+ on \S+, process {holder.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d "
        r"[+-]\d{4}: python -c \S+",
        who,
    )
    assert all(part in cure for part in ("wait", "stop it", "run this again", "--work"))
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
    command = HOLD.replace("(Path(sys.argv[1]))", "(Path(sys.argv[1]), wait=True)").replace("time.sleep(60)", "")
    waiting = subprocess.Popen(
        [sys.executable, "-c", command, str(tmp_path / "thing")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert waiting.stdout.readline().startswith(f"waiting: {tmp_path}/thing is being made by ")
    holder.kill()
    assert waiting.communicate(timeout=20)[0] == "held\n"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"pid": {"a": 1}, "host": 3}', '{"pid": "-1"}', '{"pid": 99999999999999999999}']
)
def test_a_damaged_record_is_no_more_than_a_poor_message(holder, tmp_path, text):
    (tmp_path / ".thing.lock.json").write_text(text)
    with pytest.raises(UserError, match="thing is being made by "):
        Lock(tmp_path / "thing")


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 12345"), OSError("No username set")])
def test_a_user_without_a_name_is_told_by_number(monkeypatch, error):
    def nameless():
        raise error

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert this_process()["user"] == f"user {os.getuid()}"


def test_a_number_that_no_process_has_is_gone():
    assert all(is_gone({"host": socket.gethostname(), "pid": pid}) for pid in ("9" * 20, "9" * 5000))


def test_who_makes_a_thing_clears_what_killed_processes_left(tmp_path):
    (tmp_path / "run").mkdir()
    old, new, other = (tmp_path / "run" / name for name in (".last.123.tmp.pt", ".best.124.tmp.pt", ".note.tmp"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    Lock(tmp_path / "run").release()
    assert set((tmp_path / "run").iterdir()) == {new, other}


def test_a_pid_of_another_machine_says_nothing(tmp_path):
    record = {"user": "a", "host": "elsewhere", "pid": "1", "since": "", "command": ""}
    assert not is_gone(record)
    (tmp_path / "r").write_text(json.dumps(record))
    assert read_record(tmp_path / "r") == record


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="file/thing cannot be made: .*file cannot be written to .*or give another --work"
    ):
        Lock(tmp_path / "file" / "thing")


@pytest.fixture
def shared():
    """A folder that everyone may write to, used as a user who is not root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        before = os.getresuid()
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 0)
        yield Path(folder)
        os.setresuid(*before)


def test_whoever_shares_the_folder_may_lock_after_another(tmp_path):
    before = os.umask(0o077)
    try:
        with Lock(tmp_path / "thing"):  # some releases of filelock delete the file afterwards
            assert (tmp_path / ".thing.lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def locked_by(folder: Path, **changes) -> Path:
    """Write a read-only lock file and its record; return what it locks."""
    (folder / ".thing.lock").touch(mode=0o444)
    if changes:
        record = {"user": "ada", "host": "elsewhere", "pid": "7", "since": "noon", "command": "python 01.py", **changes}
        (folder / ".thing.lock.json").write_text(json.dumps(record))
    return folder / "thing"


def test_of_a_lock_file_that_may_not_be_written_the_record_tells_the_holder(shared):
    place = locked_by(shared, user="bob")
    told = f"{place} is being made by bob on elsewhere, process 7, since noon: python 01.py"
    with pytest.raises(UserError) as error:
        Lock(place)
    who, cure = str(error.value).split("\n")
    assert who == told
    assert all(part in cure for part in ("wait", "stop it", f"delete {shared}/.thing.lock", "--work"))
    assert list(holders(shared)) == [told]


@pytest.mark.parametrize(
    "record", [{}, {"host": os.uname().nodename, "pid": str(2**22 + 1)}], ids=["none", "of the dead"]
)
def test_of_a_lock_file_that_nobody_holds_the_message_says_which_to_delete(shared, record):
    place = locked_by(shared, **record)
    with pytest.raises(UserError) as error:
        Lock(place)
    message = str(error.value)
    assert message.startswith(f"{place} cannot be made: ") and f"lock file {shared}/.thing.lock" in message
    assert all(part in message for part in ("nobody holds it", "delete it", "run this again", "--work"))
    assert list(holders(shared)) == []
    (shared / ".thing.lock").unlink()
    with Lock(place):
        pass


def test_a_folder_without_the_right_to_write_is_told_as_such(shared):
    folder = shared / "closed"
    folder.mkdir()
    place = locked_by(folder)
    folder.chmod(0o555)
    with pytest.raises(
        UserError, match="cannot be written to .Permission denied.; .*permission, or give another --work"
    ):
        Lock(place)
    folder.chmod(0o755)
