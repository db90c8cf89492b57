import argparse
import errno
import os
import sys

import pytest

from common.errors import UserError, listing, nearest
from common.process import command_line
from common.process.main import run


def stopped_by(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


def test_a_users_mistake_is_one_message_and_exit_code_2(capsys):
    assert stopped_by(UserError("x is missing; run: y"), capsys) == (2, "error: x is missing; run: y\n")


def test_a_full_disk_is_one_message_that_names_the_file(capsys):
    code, message = stopped_by(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "work/folds.csv"), capsys)
    assert code == 2 and "No space left on device: work/folds.csv" in message


def test_ctrl_c_names_the_command_that_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["04_train.py", "--work", "my work"])
    code, message = stopped_by(KeyboardInterrupt(), capsys)
    assert code == 130 and "To resume: python 04_train.py --work 'my work'" in message


def test_a_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_misspelt_flags_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.parser("").parse_args(["--wrk=x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown argument --wrk=x; did you mean --work?\n"


@pytest.mark.parametrize("text", ["a", "-1", "0,0", "", "0,"])
def test_fold_numbers_are_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError):
        command_line.fold_numbers(text)


def test_lists_of_values():
    assert command_line.fold_numbers("0,2") == [0, 2] and command_line.names("a, b") == ["a", "b"]


def test_the_nearest_word_or_all_of_them():
    assert nearest("resnet5", ["resnet50", "demo"]) == "did you mean resnet50?"
    assert nearest("zzz", ["b", "a"]) == nearest("zzz", ["b", "a"], every=True) == "known: a, b"
    assert nearest("resnet5", ["resnet50", "demo"], every=True) == "did you mean resnet50? known: demo, resnet50"


def test_a_list_of_eleven_shows_ten():
    assert listing("abc") == "  a\n  b\n  c"
    assert listing(range(11)).endswith("  9\n  ... and 1 more (11 in all)")
