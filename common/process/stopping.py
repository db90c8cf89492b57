"""The signals that ask a process to end: Ctrl+C, SIGTERM and SIGUSR1 from schedulers, SIGHUP when a terminal closes.

One flag, `STATE.asked`, is checked between batches. Who does what:

who                                    on Ctrl+C                        on SIGTERM, SIGHUP, SIGUSR1
a stage with nothing to save           KeyboardInterrupt                Stopped
a stage that trains, inside `held`     Stopped at the next `check`;     Stopped at the next `check`
                                       a second: KeyboardInterrupt
a stage whose workers train, `held`    the same, and SIGTERM to them    the same, and SIGTERM to them
a follower under torchrun, `held`      waits GRACE_SECONDS for the main process to save, which ends both
a worker process that trains           never sees it                    SIGTERM: Stopped at the next `check`
a worker process with samples          never sees it                    SIGTERM: ends; never sees the others
a loader process                       ignores it                       SIGTERM: ends after GRACE_SECONDS
a forked process                       ends                             ends
"""

import _thread
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

GRACE_SECONDS = 25  # for other processes to save; schedulers kill whatever is left after 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SIGTERM_CODE = 128 + signal.SIGTERM


class Stopped(BaseException):
    """A signal asked this process to end: end now, as with a KeyboardInterrupt."""


@dataclass
class State:
    """Which signal this process has received (0 = none), and whether it waits for the next `check`."""

    asked: int = 0
    held: bool = False


STATE = State()


def is_follower() -> bool:
    """Tell whether another process that torchrun started writes the files and messages."""
    return os.environ.get("RANK", "0") != "0"


def listen() -> None:
    """Handle signals to stop from here on as the module's table says."""
    STATE.asked, listener = 0, os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != listener:
            os._exit(128 + number)
        _ask(number)

    for number in SIGNALS:
        # nohup ignores SIGHUP, and a shell ignores Ctrl+C for its background jobs.
        if number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)


def _ask(number: int) -> None:
    if number == signal.SIGINT and (STATE.asked or not STATE.held):
        raise KeyboardInterrupt
    if STATE.asked:
        return
    STATE.asked = number
    if not STATE.held:
        raise Stopped
    if number == signal.SIGINT and not is_follower():
        os.write(2, b"\nstopping when everything is saved; press Ctrl+C again to stop at once\n")
    workers = [child for child in multiprocessing.active_children() if not child.daemon]
    for worker in workers:
        worker.terminate()
    if workers or is_follower():  # they may never end by themselves
        end_later()


@contextmanager
def held() -> Iterator[None]:
    """Make signals wait inside for the next `check`, where everything can be saved; a second Ctrl+C does not wait."""
    before, STATE.held = STATE.held, True
    try:
        yield
        check()
    finally:
        STATE.held = before


def check() -> None:
    """Raise Stopped if a signal has come; a follower continues, as the main process needs it to save."""
    if STATE.asked and not is_follower():
        raise Stopped


def end_later() -> None:
    """End this process once others have had time to save."""

    def wait() -> None:
        time.sleep(GRACE_SECONDS)
        if STATE.asked:
            os._exit(SIGTERM_CODE)

    # `threading` takes a lock to start a thread, and the interrupted code may hold it.
    _thread.start_new_thread(wait, ())


def when_parent_ends(parent: int, act: Callable[[], object]) -> None:
    """Call `act()` from a thread soon after this process's parent has ended, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        act()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def blocked(signals: Iterable[int], helpers: Iterable[Any] = (resource_tracker,)) -> Iterator[None]:
    """Block signals; processes that are started inside never see them: their parent signals or ends them.

    helpers : modules whose `ensure_running` starts a process that others need
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    try:
        for helper in helpers:  # first: starting one lets Ctrl+C and SIGTERM through again
            helper.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
