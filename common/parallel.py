"""Many independent jobs through joblib: on this machine's cores, or on a dask cluster that shares its files."""

from contextlib import contextmanager
from pathlib import Path

import joblib

from common.errors import UserError
from common.progress import progress

ROOT = str(Path(__file__).resolve().parent.parent)
SECONDS_TO_ANSWER = 20


def run_parallel(function, jobs: list[tuple], n_jobs: int, label: str, unit: str = "samples"):
    """Call `function(*job)` for each job; yield (index of the job, result) as they are done, with progress.

    Memory is bounded by the number of workers: jobs are handed out as others finish.
    """
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    results = parallel(joblib.delayed(_indexed)(index, function, job) for index, job in enumerate(jobs))
    yield from progress(results, len(jobs), label, unit)


def _indexed(index, function, job):
    return index, function(*job)


def run_jobs(function, jobs: list[tuple], n_jobs: int, cluster: str | None, label: str) -> None:
    """Call `function(*job)` for jobs of minutes or more (a recipe's fold): one after the other here, several, or elsewhere."""
    if n_jobs == 1 and not cluster:
        for job in jobs:
            function(*job)
        return
    with workers(n_jobs, cluster) as n_workers:
        for _ in run_parallel(function, jobs, n_workers, label, unit="folds"):
            pass


@contextmanager
def workers(n_jobs: int, cluster: str | None):
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
        raise UserError(f"no dask scheduler answers at {cluster} ({str(error).splitlines()[0]}); start one with: "
                        "dask scheduler, and on each machine: dask worker ADDRESS --nthreads 1") from None
    with client, joblib.parallel_config("dask"):
        client.run(exec, f"import sys; sys.path.insert(0, {ROOT!r})")  # where workers find this project
        yield -1
