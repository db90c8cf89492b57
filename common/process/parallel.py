"""Many independent jobs through joblib: on this machine's cores, or on a dask cluster that shares its files."""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import joblib
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from common.errors import WORKER_LOST, UserError
from common.process import stopping
from common.process.progress import progress

T = TypeVar("T")

ROOT = str(Path(__file__).resolve().parents[2])
SECONDS_TO_ANSWER = 20
NOT_TERM = tuple(
    number for number in stopping.SIGNALS if number != signal.SIGTERM
)  # by which a parent ends worker processes


def run_parallel(
    function: Callable[..., T],
    jobs: Sequence[tuple],
    n_jobs: int,
    label: str,
    unit: str = "samples",
    unseen: Iterable[int] = NOT_TERM,
) -> Iterator[tuple[int, T]]:
    """Call `function(*job)` for each job; yield (index of the job, result) as they are done, with progress.

    Memory is bounded by the number of workers: jobs are handed out as others finish.
    unseen : signals that worker processes do not see, unless a job lets them through
    """
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    helpers = resource_tracker, loky_tracker
    # Held, because worker processes that are half started would never end.
    with stopping.held(), stopping.blocked(unseen, helpers) if n_jobs != 1 else nullcontext():
        results = parallel(
            joblib.delayed(_indexed)(index, function, job, os.getpid()) for index, job in enumerate(jobs)
        )
    try:
        yield from progress(results, len(jobs), label, unit)
    except BrokenProcessPool:
        raise UserError(f"{label}: {WORKER_LOST}") from None


def _indexed(index: int, function: Callable[..., T], job: tuple, parent: int) -> tuple[int, T]:
    if _works_for(parent):
        _join(parent)
    return index, function(*job)


def _works_for(parent: int) -> bool:
    """Tell whether this is a worker process that `parent` started; a dask worker does jobs in threads instead."""
    return os.getpid() != parent and threading.current_thread() is threading.main_thread()


PLACE: list[Any] = []  # of this worker process: its number, and the socket that holds it


@cache
def _join(parent: int) -> None:
    """Set this worker process up: it takes a number, and ends soon after its parent, when nobody waits for results."""
    stopping.when_parent_ends(parent, lambda: os._exit(1))
    # Loader processes, which it may start, know nothing of loky's way to start processes, its default.
    multiprocessing.set_start_method(None, force=True)
    for number in count():
        place = socket.socket(socket.AF_UNIX)
        try:
            place.bind(
                f"\0hpa-pipeline-{parent}-{number}"
            )  # no file: it is free again when this process ends, however it ends
        except OSError:
            place.close()
            continue
        PLACE[:] = number, place
        return


def worker_number() -> int | None:
    """Return the number of this worker process, from 0 on and unlike those of its siblings; None in other processes."""
    return PLACE[0] if PLACE else None


def run_jobs(
    function: Callable[..., object], jobs: Sequence[tuple], n_jobs: int, cluster: str | None, label: str
) -> None:
    """Call `function(*job)` for jobs of minutes or more (a recipe's fold): one by one, at once, or elsewhere."""
    if n_jobs == 1 and not cluster:
        for job in jobs:
            function(*job)
        return
    with workers(n_jobs, cluster) as n_workers, stopping.held() if cluster is None else nullcontext():
        calls = [(os.getpid(), function, job) for job in jobs]
        done = run_parallel(_stoppable, calls, n_workers, label, "folds", stopping.SIGNALS)
        if any([was_stopped for _, was_stopped in done]) and not stopping.STATE.asked:
            raise UserError(f"{label}: {WORKER_LOST}")
        if cluster is None:  # idle ones would only note a SIGTERM, and be waited for
            get_reusable_executor(reuse=True).shutdown(kill_workers=True)


def _stoppable(parent: int, function: Callable[..., object], job: tuple) -> bool:
    """Do a long job; returns whether SIGTERM to this machine's worker process ended it, when it had saved what it had.

    The process stays: joblib kills all others, whatever they have not saved, when one has ended.
    """
    if not _works_for(parent):
        function(*job)
        return False
    _listen()
    try:
        stopping.check()
        function(*job)
    except stopping.Stopped:
        return True
    return False


@cache
def _listen() -> None:
    """Let SIGTERM through to this worker process, where it waits for the next `stopping.check` of any job."""
    stopping.STATE.held = True
    stopping.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def workers(n_jobs: int, cluster: str | None) -> Iterator[int]:
    """Give the number of jobs that `run_parallel` may do at once; with `cluster` it uses that dask scheduler's workers.

    Workers must see the same files under the same paths, and have the same packages. What a lost worker had in hand is
    done again by another one. Raises UserError where the scheduler does not answer.
    """
    if cluster is None:
        yield n_jobs
        return
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--cluster needs dask: pip install distributed") from None
    try:
        client = Client(cluster, timeout=SECONDS_TO_ANSWER)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no dask scheduler answers at {cluster} ({str(error).splitlines()[0]}); start one with: "
            "dask scheduler, and on each machine: dask worker ADDRESS --nthreads 1"
        ) from None
    with client, joblib.parallel_config("dask"):
        client.run(exec, f"import sys; sys.path.insert(0, {ROOT!r})")  # where workers find this project
        yield -1
