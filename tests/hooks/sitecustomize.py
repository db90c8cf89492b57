"""Found by every Python of a test that puts this folder on PYTHONPATH: changes modules of common/ as they are imported.

HOOK_CHECKPOINT_SECONDS  seconds between checkpoints of stage 04, also between epochs
HOOK_FULL_DISK           a file: the k-th write of the process tree fails, half done, with 'No space left on device',
                         where k is the number in this file, which every write lowers by one
"""

import errno
import fcntl
import importlib.abc
import importlib.util
import os
import sys


def more_checkpoints(training):
    training.CHECKPOINT_SECONDS = training.EPOCH_SECONDS = float(os.environ["HOOK_CHECKPOINT_SECONDS"])


def full_disk(files):
    real = os.fsync

    def fsync(number):
        with open(os.environ["HOOK_FULL_DISK"], "r+") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            left = int(counter.read()) - 1
            counter.seek(0)
            counter.write(f"{left:8}")
        if left == 0:
            os.ftruncate(number, os.fstat(number).st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    files.os = type("os", (), {**vars(os), "fsync": staticmethod(fsync)})


CHANGES = {"common.training": ("HOOK_CHECKPOINT_SECONDS", more_checkpoints), "common.files": ("HOOK_FULL_DISK", full_disk)}


class Changer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as usual, and changes it then."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES or CHANGES[name][0] not in os.environ:
            return None
        sys.meta_path.remove(self)
        try:
            self.found = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        return importlib.util.spec_from_loader(name, self, origin=self.found.origin)

    def exec_module(self, module):
        module.__file__ = self.found.origin
        self.found.loader.exec_module(module)
        CHANGES[module.__name__][1](module)


sys.meta_path.insert(0, Changer())
