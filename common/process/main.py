"""How a script starts and ends: what an error means to the user, exit codes, and what a signal leaves."""

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
    "the GPU's memory does not do, perhaps because others use it too (nvidia-smi tells); finished work is kept: wait, "
    "or try --device cpu"
)


SMALLER = (
    "finished work is kept: take a smaller batch (04_train.py --micro-batch), a smaller crop, or a smaller network"
)


BUGS = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
)  # whatever they came from, they are this project's
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)  # of files whose name an error may lack
SHARED_MEMORY_FULL = ("unable to allocate shared memory", "unable to mmap", "Bus error")
SMALL_SHARED_MEMORY = (
    "/dev/shm is full, where loader processes put batches; finished work is kept: give it more (docker run "
    "--shm-size=16g), or use fewer --workers"
)
NOT_LOADED = ("failed to map segment", "annot allocate memory")  # of shared objects
LOST = ("onnection closed by peer", "onnection reset by peer", "gloo/transport", "NCCL error", "Socket Timeout")


def run(main: Callable[[], object]) -> None:
    """Call a script's `main`; a user's mistake ends in one message and exit code 2, never in a traceback."""
    # Waiting OpenMP threads spin for microseconds, not milliseconds, before they sleep: nothing is lost by that on
    # a quiet machine, and on a shared one torch is ten times faster. Set before torch is loaded, which `main` does.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # OpenCV refuses headers that claim more pixels; it too asks when it is loaded.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**26))
    sys.excepthook = tell_exception
    open_streams()
    for stream in (sys.stdout, sys.stderr):  # paths may have names that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started one talks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    stopping.listen()
    if "RUN_ALL_COMMAND" in os.environ:  # SIGKILL of run_all.sh's process ends this one too
        stopping.when_parent_ends(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        main()
        for number in stopping.SIGNALS:  # all is done: while Python clears up, nothing is to be stopped
            signal.signal(number, signal.SIG_IGN)
    except SystemExit:
        raise
    except BaseException as error:
        if stop := stop_behind(error):
            stopped(stop)
        if message := explain(error):
            fail(message)
        if isinstance(error, BrokenPipeError):  # whoever read the output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        raise
    finally:
        kill([child for child in multiprocessing.active_children() if child.daemon])  # loaders, which ignore SIGTERM
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C while Python clears up is no traceback


def tell_exception(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that nobody caught, but for threads of multiprocessing that lose a process which has ended."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main or not isinstance(value, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, value, trace)


def open_streams() -> None:
    """Open closed streams, as of daemons, on /dev/null: the next file to be opened would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def stop_behind(error: BaseException | None) -> BaseException | None:
    """Return the stop that an error comes from, Ctrl+C or another signal; None where it is one of its own.

    What is raised while a module in C is imported comes out as an ImportError; and when the main process of several has
    saved and left, the others lose touch.
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, stopping.Stopped)):
            return error
        error = error.__cause__ or error.__context__
    return stopping.Stopped() if stopping.STATE.asked else None


def explain(error: BaseException | None) -> str | None:
    """Return the message for an error that a user can do something about, or for one that it hides; None for others."""
    while error is not None and not isinstance(error, BUGS):
        if message := explain_one(error):
            return message
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def explain_one(error: BaseException) -> str | None:
    """Return the message for an error by itself; see `explain`."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # From a loader's worker process torch hands on the message with a traceback before it.
        return str(error).split("UserError: ")[-1].rstrip()
    if isinstance(error, BrokenPipeError):
        return None if output_is_closed() else WORKER_LOST
    if isinstance(error, EOFError) and text == "unexpected EOF":  # of the process that starts the loaders
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
            f"{str(error).strip()} (perhaps memory ran out); finished work is kept. To go on: {command()}, if need be "
            "with fewer --workers"
        )
    return None


def is_lost_process(error: BaseException) -> bool:
    """Tell whether gloo or NCCL miss a process that trains together with this one."""
    known = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return known or isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def address_limit() -> str:
    """Say how much memory `ulimit -v` allows; nothing where that is not limited."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else f"; ulimit -v is {limit / 2**30:.1f} GB"


def output_is_closed() -> bool:
    """Tell whether nobody reads any more what this process prints."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def kill(children: list[multiprocessing.process.BaseProcess]) -> None:
    """End worker or loader processes at once."""
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error for each
    for child in children:
        child.kill()


def stopped(stop: BaseException) -> NoReturn:
    """End after a signal with the command to resume, and the exit code that shells expect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kill(multiprocessing.active_children())  # what they had to save is saved
    say_stopped(stop)
    sys.exit(128 + ((stopping.STATE.asked or signal.SIGTERM) if isinstance(stop, stopping.Stopped) else signal.SIGINT))


def say_stopped(stop: BaseException) -> None:
    """Print the command to resume, unless another process does: torchrun's first, or on Ctrl+C run_all.sh's."""
    by_hand = isinstance(stop, KeyboardInterrupt) or stopping.STATE.asked == signal.SIGINT
    if not stopping.is_follower() and not ("RUN_ALL_COMMAND" in os.environ and by_hand):
        print(f"\nstopped; finished work is kept. To go on: {command()}", file=sys.stderr)
