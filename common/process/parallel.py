"""Run many independent jobs with joblib: on this machine's cores, or on a dask cluster that shares its files."""

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
# All but SIGTERM, with which a parent ends its worker processes.
NOT_TERM = tuple(number for number in stopping.SIGNALS if number != signal.SIGTERM)


def run_parallel(
    function: Callable[..., T],
    jobs: Sequence[tuple],
    n_jobs: int,
    label: str,
    unit: str = "samples",
    unseen: Iterable[int] = NOT_TERM,
) -> Iterator[tuple[int, T]]:
    """Call `function(*job)` for each job, with progress; yield (index of the job, result) as jobs finish.

    Memory is bounded by the number of workers: a new job starts only when another has finished.
    unseen : signals that worker processes do not see, unless a job lets them through
    """
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    helpers = resource_tracker, loky_tracker
    # Held, because worker processes that have only half started would never end.
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
    """Tell whether this is a worker process that `parent` started; a dask worker runs jobs in threads instead."""
    return os.getpid() != parent and threading.current_thread() is threading.main_thread()


PLACE: list[Any] = []  # this worker process's number, and the socket that reserves it


@cache
def _join(parent: int) -> None:
    """Set up this worker process: it takes a number, and ends soon after its parent, as nobody waits for results."""
    stopping.when_parent_ends(parent, lambda: os._exit(1))
    # Loader processes that it may start cannot use loky's start method, which is the default here.
    multiprocessing.set_start_method(None, force=True)
    for number in count():
        place = socket.socket(socket.AF_UNIX)
        try:
            # An abstract socket, not a file: it is free again when this process ends, however it ends.
            place.bind(f"\0hpa-pipeline-{parent}-{number}")
        except OSError:
            place.close()
            continue
        PLACE[:] = number, place
        return


def worker_number() -> int | None:
    """Return this worker process's number, from 0 and unique among its siblings; None in other processes."""
    return PLACE[0] if PLACE else None


def run_jobs(
    function: Callable[..., object],
    jobs: Sequence[tuple],
    n_jobs: int,
    cluster: str | None,
    label: str,
    unit: str = "folds",
) -> None:
    """Call `function(*job)` for jobs of minutes or more (a recipe's fold): in turn, in parallel, or elsewhere."""
    if n_jobs == 1 and not cluster:
        for job in jobs:
            function(*job)
        return
    with workers(n_jobs, cluster) as n_workers, stopping.held() if cluster is None else nullcontext():
        calls = [(os.getpid(), function, job) for job in jobs]
        done = run_parallel(_stoppable, calls, n_workers, label, unit, stopping.SIGNALS)
        if any([was_stopped for _, was_stopped in done]) and not stopping.STATE.asked:
            raise UserError(f"{label}: {WORKER_LOST}")
        if cluster is None:  # idle workers only note a SIGTERM, and would be waited for
            get_reusable_executor(reuse=True).shutdown(kill_workers=True)


def _stoppable(parent: int, function: Callable[..., object], job: tuple) -> bool:
    """Run a long job; return whether SIGTERM to this machine's worker process stopped it, after it had saved.

    The process stays: when one ends, joblib kills all others, even those that have not saved.
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
    """Let SIGTERM through to this worker process; it takes effect at the next `stopping.check` of any job."""
    stopping.STATE.held = True
    stopping.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def workers(n_jobs: int, cluster: str | None) -> Iterator[int]:
    """Yield how many jobs `run_parallel` may run at once; with `cluster` they run on that dask scheduler's workers.

    Workers must see the same files under the same paths, and have the same packages. If a worker is lost, another one
    repeats its jobs. Raises UserError if the scheduler does not answer.
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
        client.run(exec, f"import sys; sys.path.insert(0, {ROOT!r})")  # so that workers find this project
        yield -1
