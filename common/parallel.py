"""Many independent jobs through joblib: on this machine's cores, or on whatever backend joblib is given."""

import joblib

from common.progress import progress


def run_parallel(function, jobs: list[tuple], n_jobs: int, label: str, unit: str = "samples"):
    """Call `function(*job)` for each job; yield (index of the job, result) as they are done, with progress.

    Memory is bounded by the number of workers: jobs are handed out as others finish.
    """
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    results = parallel(joblib.delayed(_indexed)(index, function, job) for index, job in enumerate(jobs))
    yield from progress(results, len(jobs), label, unit)


def _indexed(index, function, job):
    return index, function(*job)
