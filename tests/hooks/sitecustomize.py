"""Make stage 04 write checkpoints more often, in every Python of a test that puts this folder on PYTHONPATH.

HOOK_CHECKPOINT_SECONDS  seconds between checkpoints, within epochs and between them
"""

import importlib.abc
import importlib.util
import os
import sys


class Hurry(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads common.train.loop as usual, then changes its constants."""

    def find_spec(self, name, path, target=None):
        if name != "common.train.loop":
            return None
        sys.meta_path.remove(self)
        self.found = importlib.util.find_spec(name)
        return importlib.util.spec_from_loader(name, self, origin=self.found.origin)

    def exec_module(self, module):
        module.__file__ = self.found.origin
        self.found.loader.exec_module(module)
        module.CHECKPOINT_SECONDS = module.EPOCH_SECONDS = float(os.environ["HOOK_CHECKPOINT_SECONDS"])


sys.meta_path.insert(0, Hurry())
