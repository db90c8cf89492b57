import resource
import sys

import numpy as np
import pytest

from common.train.hardware import HardwareOptions, choose_hardware


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is set on Linux only")
def test_memory_that_is_freed_is_kept_for_the_next_batch():
    choose_hardware(HardwareOptions("cpu", "fp32", 0))

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(2**24, np.uint8).fill(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(5)) < 100  # out of 4,096 pages
