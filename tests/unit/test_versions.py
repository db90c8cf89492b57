"""What made a file: the commit as git says it, wherever git keeps it, and versions in every sidecar and checkpoint."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from common.artifacts.files import write_text
from common.artifacts.stage import Stage
from common.artifacts.versions import commit, made_with
from common.train.checkpoints import save_checkpoint

NEEDS_GIT = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    call = ["git", "-C", folder, *name, *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--initial-branch", "main")
    git(folder, "commit", "--allow-empty", "--message", "first")
    return folder


@NEEDS_GIT
@pytest.mark.parametrize("state", [(), ("pack-refs", "--all"), ("checkout", "--detach")])
def test_the_commit_is_what_git_says(checkout, state):
    if state:
        git(checkout, *state)
    assert commit(checkout) == git(checkout, "rev-parse", "HEAD")


@NEEDS_GIT
def test_a_worktree_has_its_own_commit(checkout):
    git(checkout, "worktree", "add", "-b", "other", checkout.parent / "tree")
    git(checkout.parent / "tree", "commit", "--allow-empty", "--message", "second")
    assert commit(checkout.parent / "tree") == git(checkout.parent / "tree", "rev-parse", "HEAD") != commit(checkout)


@pytest.mark.parametrize("head", [None, "", "ref: refs/heads/none", "nonsense"])
def test_elsewhere_there_is_none(tmp_path, head):
    if head is not None:
        write_text(tmp_path / ".git" / "HEAD", head)
    assert commit(tmp_path) is None


def test_sidecars_and_checkpoints_say_what_made_them_and_refuse_nothing(tmp_path, monkeypatch):
    stage = Stage("0x_stage", tmp_path / "out.txt", {}, {})
    with stage.making():
        write_text(stage.artifact, "made")
    versions = json.loads(stage.sidecar.read_text())["made_with"]
    assert versions == made_with() and versions["numpy"] == np.__version__
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    save_checkpoint(tmp_path / "a.pt", {"model": {}})
    assert torch.load(tmp_path / "a.pt", weights_only=True)["made_with"] == versions
    monkeypatch.setattr("common.artifacts.stage.made_with", lambda: {"python": "2.7"})
    assert stage.is_current()
