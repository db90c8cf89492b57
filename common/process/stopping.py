"""The signals that ask a process to end: Ctrl+C, SIGTERM and SIGUSR1 as schedulers send them, SIGHUP as a closing terminal does.

Each first saves what would be lost, and waits for the end of an import.
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
from types import FrameType, ModuleType

GRACE_SECONDS = 25  # that other processes get to save; schedulers kill what is left after 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SIGTERM_CODE = 128 + signal.SIGTERM


class Stopped(BaseException):
    """A signal asked for the end: end now, as with a KeyboardInterrupt."""


@dataclass
class State:
    """The process that listens, which signal has come to it (0 = none), whether that waits for the next `check`, and whether
    worker processes are told meanwhile; whether no signal is heard, for a moment."""

    pid: int = 0
    asked: int = 0
    held: bool = False
    passed_on: bool = False
    deaf: bool = False


STATE = State()


def is_follower() -> bool:
    """Tell whether another process that torchrun started writes the files and talks."""
    return os.environ.get("RANK", "0") != "0"


def listen() -> None:
    """From here on a signal that asks for the end raises Stopped in the main thread, Ctrl+C a KeyboardInterrupt."""
    STATE.pid, STATE.asked = os.getpid(), 0
    for number in SIGNALS:
        # nohup has SIGHUP ignored, and a shell Ctrl+C for what runs in its background.
        if number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def spare_imports() -> None:
    """Let Ctrl+C wait for the end of an import: modules in C may take an exception for the end of the world."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_ctrl_c)


@contextmanager
def blocked(signals: Iterable[int], helpers: Iterable[ModuleType] = (resource_tracker,)) -> Iterator[None]:
    """Hold signals back; processes that are started inside never see them: their parent tells or ends them.

    helpers : modules whose `ensure_running` starts a process that the others need
    """
    # Before: Ctrl+C and SIGTERM are let through again when a helper has been started. They know no other signals.
    outer = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    for helper in helpers:
        helper.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals) - ({signal.SIGHUP, signal.SIGUSR1} - outer)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, for a moment, signals wait: what is begun, such as worker processes, must be whole."""
    STATE.deaf = True
    try:
        yield
    finally:
        STATE.deaf = False


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    if not _must_wait(number, frame):
        raise KeyboardInterrupt


def _must_wait(number: int, frame: FrameType | None) -> bool:
    """Tell whether this is no time for an exception, as while a module is imported; the signal comes again until it is."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None and not STATE.deaf:
        return False
    _later(0.05, os.kill, os.getpid(), number)
    return True


@contextmanager
def held(passed_on: bool = False) -> Iterator[None]:
    """Inside, a signal waits for the next `check`, which stands where everything can be saved; a second Ctrl+C does not.

    passed_on : worker processes are told at once, and save what they have; their jobs end as if they were done
    """
    before = STATE.held, STATE.passed_on
    STATE.held, STATE.passed_on = True, passed_on
    try:
        yield
        check()
    finally:
        STATE.held, STATE.passed_on = before


@contextmanager
def at_work() -> Iterator[None]:
    """For a job of a worker process: inside, a signal ends it; outside it is noted, and the next job ends as it begins."""
    STATE.held = False
    try:
        check()
        yield
    finally:
        STATE.held = True


def check() -> None:
    """Raise Stopped if a signal has come. Of several processes the main one decides: it needs the others until it has saved."""
    if STATE.asked and not is_follower():
        raise Stopped


def when_parent_ends(parent: int, act: Callable[[], object]) -> None:
    """Call `act()` from a thread soon after this process's parent has ended, also by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        act()

    threading.Thread(target=watch, daemon=True).start()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != STATE.pid:  # a forked process, which somebody ends
        os._exit(128 + number)
    if _must_wait(number, frame):
        return
    if number == signal.SIGINT and (STATE.asked or not STATE.held):
        raise KeyboardInterrupt
    again, STATE.asked = STATE.asked, STATE.asked or number
    if number == signal.SIGINT:
        os.write(2, b"\nstopping when everything is saved; press Ctrl+C again to stop at once\n")
    if STATE.held and is_follower():  # it may wait for the main process for ever
        end_later()
    if again:
        return
    if STATE.passed_on:
        for child in multiprocessing.active_children():
            child.terminate()
        end_later()
    elif not STATE.held:
        _stop_children()
        raise Stopped


def end_later() -> None:
    """End this process when others have had time to save."""
    _later(GRACE_SECONDS, os._exit, SIGTERM_CODE)


def _later(seconds: float, act: Callable[..., object], *arguments: object) -> None:
    """Call `act(*arguments)` from a thread after some seconds. To start one of `threading`'s takes a lock, which the code that a
    signal has interrupted may hold."""

    def wait() -> None:
        time.sleep(seconds)
        act(*arguments)

    _thread.start_new_thread(wait, ())


def _stop_children() -> None:
    """Pass SIGTERM on to worker processes and wait until they have saved what they had; loaders have nothing to save."""
    children = [child for child in multiprocessing.active_children() if not child.daemon]
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        child.terminate()
    for child in children:
        child.join(max(0, deadline - time.monotonic()))
