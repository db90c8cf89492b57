"""Time a stage against the bare network, batch by batch in turn: if the machine changes its speed, it affects both."""

import time
from itertools import count

import numpy as np


class InTurn:
    """Does the bare work of each batch before a stage gets that batch.

    bare : function of a batch's number
    """

    def __init__(self, bare):
        self.bare = bare
        self.bare_s = self.waiting_s = 0.0

    def __call__(self, feed):
        """Yield the stage's batches."""
        for k in count():
            self.bare_s += timed(lambda k=k: self.bare(k))
            started = time.perf_counter()
            batch = next(feed, None)
            if batch is None:
                return
            self.waiting_s += time.perf_counter() - started
            yield batch

    def measure(self, work, repeats: int, n: int) -> dict:
        """Do the stage's work on n samples once as a warm-up, and `repeats` times with measurements.

        Returns milliseconds per sample of both, the median ratio of the stage to bare with its 95 % interval, and the
        share of the stage's time spent waiting for batches.
        """
        seconds = []
        for _ in range(repeats + 1):
            self.bare_s = self.waiting_s = 0.0
            whole = timed(work)
            seconds.append((self.bare_s, whole - self.bare_s, self.waiting_s))
        bare, stage, waiting = np.array(seconds[1:]).T
        drawn = np.random.default_rng(0).choice(stage / bare, (2000, repeats))
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        figures = {
            "bare_ms": 1000 * np.median(bare) / n,
            "stage_ms": 1000 * np.median(stage) / n,
            "ratio": np.median(stage / bare),
            "low": low,
            "high": high,
            "waiting": np.median(waiting / stage),
        }
        return {key: round(float(value), 4) for key, value in figures.items()}


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
