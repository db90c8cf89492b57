"""How a script starts and ends: what an error means to the user, exit codes, and what happens on a signal."""

import contextlib
import errno
import io
import multiprocessing
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from common.errors import WORKER_LOST, UserError, is_out_of_memory
from common.process import stopping
from common.process.command_line import command

OUT_OF_MEMORY = (
    "the GPU is out of memory, perhaps because others use it too (see nvidia-smi); finished work is kept: wait, or try "
    "--device cpu"
)


SMALLER = "finished work is kept: use a smaller batch (04_train.py --micro-batch), a smaller crop, or a smaller network"


# These are bugs of this project, whatever error they came from.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)  # errors that may not name their file
SHARED_MEMORY_FULL = ("unable to allocate shared memory", "unable to mmap", "Bus error")
SMALL_SHARED_MEMORY = (
    "/dev/shm, where loader processes put batches, is full; finished work is kept: make it larger (docker run "
    "--shm-size=16g), or use fewer --workers"
)
NOT_LOADED = ("failed to map segment", "annot allocate memory")  # of shared objects
LOST = ("onnection closed by peer", "onnection reset by peer", "gloo/transport", "NCCL error", "Socket Timeout")


def run(main: Callable[[], object]) -> None:
    """Call a script's `main`; a user's mistake ends in one message and exit code 2, never in a traceback."""
    # Waiting OpenMP threads spin for microseconds, not milliseconds, before they sleep. This costs nothing on a quiet
    # machine, and makes torch ten times faster on a shared one. It must be set before `main` loads torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # OpenCV refuses headers that claim more pixels; it reads this when it is loaded.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**26))
    sys.excepthook = tell_exception
    open_streams()
    for stream in (sys.stdout, sys.stderr):  # paths may not be valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":  # only one of torchrun's processes prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    stopping.listen()
    if "RUN_ALL_COMMAND" in os.environ:  # SIGKILL of run_all.sh's process ends this one too
        stopping.when_parent_ends(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        main()
        for number in stopping.SIGNALS:  # all work is done: there is nothing to stop while Python cleans up
            signal.signal(number, signal.SIG_IGN)
    except SystemExit:
        raise
    except BaseException as error:
        if stop := stop_behind(error):
            stopped(stop)
        if message := explain(error):
            fail(message)
        if isinstance(error, BrokenPipeError):  # the reader of the output (head, say) has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        raise
    finally:
        kill([child for child in multiprocessing.active_children() if child.daemon])  # loaders, which ignore SIGTERM
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl+C while Python cleans up


def tell_exception(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception, except from multiprocessing's threads that lost a process which has ended."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main or not isinstance(value, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, value, trace)


def open_streams() -> None:
    """Open closed streams (daemons have them) on /dev/null, or the next file to be opened takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def stop_behind(error: BaseException | None) -> BaseException | None:
    """Return the stop (Ctrl+C or another signal) that caused an error; None for an error of its own.

    An exception while a C module is imported turns into an ImportError. And when the main process of several has saved
    and left, the others lose their connection.
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, stopping.Stopped)):
            return error
        error = error.__cause__ or error.__context__
    return stopping.Stopped() if stopping.STATE.asked else None


def explain(error: BaseException | None) -> str | None:
    """Return the message for an error, or a cause of it, that the user can do something about; None for others."""
    while error is not None and not isinstance(error, BUGS):
        if message := explain_one(error):
            return message
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def explain_one(error: BaseException) -> str | None:
    """Return the message for an error without its causes; see `explain`."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # From a loader process torch passes the message on with a traceback before it.
        return str(error).split("UserError: ")[-1].rstrip()
    if isinstance(error, BrokenPipeError):
        return None if output_is_closed() else WORKER_LOST
    if isinstance(error, EOFError) and text == "unexpected EOF":  # from the process that starts the loaders
        return WORKER_LOST
    if isinstance(error, (ConnectionError, TimeoutError)) and not error.filename:
        lost = f"a connection to another process or machine was lost ({error})"
        return f"{lost}; finished work is kept. To resume: {command()}"
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in FULL_DISK):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}; check that the folder exists, can be written and has space"
    if any(words in text for words in SHARED_MEMORY_FULL):
        return f"{SMALL_SHARED_MEMORY}. To resume: {command()}"
    if isinstance(error, ImportError) and any(words in text for words in NOT_LOADED):
        library = text.splitlines()[-1]
        return f"out of memory while loading a library ({library}){address_limit()}; ask the scheduler for more"
    if "LOCAL_WORLD_SIZE" in os.environ and is_lost_process(error):
        return (
            f"another of torchrun's {os.environ.get('WORLD_SIZE')} processes was lost (perhaps memory ran out); "
            f"finished work is kept. To resume: {command()}"
        )
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"out of memory ({(text or 'MemoryError').splitlines()[0]}){address_limit()}; {SMALLER}"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            f"{str(error).strip()} (perhaps memory ran out); finished work is kept. To resume: {command()}, with "
            "fewer --workers if needed"
        )
    return None


def is_lost_process(error: BaseException) -> bool:
    """Tell whether gloo or NCCL lost a process that trains together with this one."""
    known = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return known or isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def address_limit() -> str:
    """Describe the memory limit of `ulimit -v`; an empty text if there is none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else f"; ulimit -v is {limit / 2**30:.1f} GB"


def output_is_closed() -> bool:
    """Tell whether nobody reads this process's output any more."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def kill(children: list[multiprocessing.process.BaseProcess]) -> None:
    """Kill worker or loader processes at once."""
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises an error for each
    for child in children:
        try:
            child.kill()
        except AttributeError:  # loky's children have no method for it
            if child.pid:
                kill_child(child.pid)


def kill_child(pid: int) -> None:
    """Kill a child of this process; another process that has its number by now is left alone."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises unless it is a child
        os.kill(pid, signal.SIGKILL)


def stopped(stop: BaseException) -> NoReturn:
    """End after a signal: print the command to resume, and exit with the code that shells expect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kill(multiprocessing.active_children())  # they have saved what they had to
    say_stopped(stop)
    sys.exit(128 + ((stopping.STATE.asked or signal.SIGTERM) if isinstance(stop, stopping.Stopped) else signal.SIGINT))


def say_stopped(stop: BaseException) -> None:
    """Print the command to resume, unless torchrun's first process or (on Ctrl+C) run_all.sh does."""
    by_hand = isinstance(stop, KeyboardInterrupt) or stopping.STATE.asked == signal.SIGINT
    if not stopping.is_follower() and not ("RUN_ALL_COMMAND" in os.environ and by_hand):
        print(f"\nstopped; finished work is kept. To resume: {command()}", file=sys.stderr)
