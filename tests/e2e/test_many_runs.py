"""Many runs, several sizes, one work folder, on drawn data: compared in one table, killed and resumed, images once."""

import os
import re
import signal
import subprocess
import sys

import pytest

from common.artifacts.files import read_json
from common.artifacts.layout import Layout
from common.demo.data import make_demo_data
from common.train.checkpoints import load_checkpoint
from tests.conftest import ROOT
from tests.slow.test_training import same

FILE = """
[plain]
base = "demo-quick"
cycle_epochs = 2
max_cycles = 2
min_cycle_gain = 0.0
buffers = [16]

[averaged]
base = "plain"
ema = 0.9
checkpointing = true

[large]
base = "plain"
image_size = 512
crop_size = 384
"""
LONG = ("cycle_epochs=20", "max_cycles=2", "min_cycle_gain=0", "buffers=16", "evaluate_epochs=5")


@pytest.fixture(scope="module")
def layout(run_script, tmp_path_factory) -> Layout:
    """A work folder up to stage 03 with 60 drawn samples, stored at two sizes for the runs of a file."""
    folder = tmp_path_factory.mktemp("experiments")
    make_demo_data(folder / "data", n_train=60, n_test=6, jobs=1)
    (folder / "my.toml").write_text(FILE)
    layout = Layout(folder / "work", folder / "data")
    run_script("01_preprocess.py", *layout.flags(), "--recipes-file", folder / "my.toml", "--recipes", "plain,large")
    run_script("02_dedup.py", *layout.flags())
    run_script("03_make_folds.py", *layout.flags(), "--n-folds", 2)
    return layout


def stored_bytes(layout) -> dict[str, int]:
    """Return the bytes of stored images by folder."""
    return {
        str(folder.relative_to(layout.work)): sum(path.stat().st_size for path in folder.glob("*.tif"))
        for folder in {path.parent for path in layout.work.rglob("*.tif")}
    }


def test_runs_of_two_sizes_are_compared_in_one_table_and_share_their_images(run_script, layout):
    def run(script, *flags):
        return run_script(script, *layout.flags(), *flags).stdout

    before, file = stored_bytes(layout), layout.work.parent / "my.toml"
    assert set(before) == {"images/128", "images/96", "images/64"} and min(before.values()) > 0
    run("04_train.py", "--recipes-file", file)
    run("04_train.py", "--recipe", "large", "--name", "larger", "--start-from", "plain")
    run("04_train.py", "--recipe", "plain", "--name", "grown", "--set", "alpha=0.9")
    run("04_train.py", "--recipe", "grown", "--more-cycles", "1")
    names = ["plain", "averaged", "large", "larger", "grown"]
    run("05_predict_oof.py", "--recipes", ",".join(names), "--tta", "none")
    out = run("06_thresholds.py", "--compare", ",".join(names), "--method", "half")
    rows = [line.split()[0] for line in out.splitlines() if re.search(r"\[0\.\d+, 0\.\d+\].* folds 0,1", line)]
    assert sorted(rows) == sorted(names) and len(read_json(layout.comparison)["differences"]) == 10
    listed = run("04_train.py", "--list-runs")
    assert all(re.search(rf"^ *{name} +0,1 ", listed, re.M) for name in names) and "4+" in listed
    assert "images/s" in listed and "memory, MiB" in listed and "ema=0.9" in listed and "image_size=512" in listed

    assert stored_bytes(layout) == before  # as many bytes of images for five runs as for none
    networks = sum(path.stat().st_size for path in layout.runs.rglob("*.pt"))
    others = sum(path.stat().st_size for path in layout.runs.rglob("*") if path.is_file()) - networks
    assert others < 2**20  # of ten trainings: logs, records and tables


KINDS = {
    "named": (("--recipe", "demo-quick", "--name", "{}", "--set", *LONG), ()),
    "averaged": (("--recipe", "demo-quick", "--name", "{}", "--set", *LONG, "ema=0.99", "checkpointing=true"), ()),
    "from another run": (
        ("--recipe", "demo@512-quick", "--name", "{}", "--start-from", "base", "--set", *LONG),
        ("--recipe", "demo-quick", "--name", "base", "--set", "cycle_epochs=2", "max_cycles=1", "buffers=16"),
    ),
    "more cycles": (
        ("--recipe", "{}", "--more-cycles", "1"),
        ("--recipe", "demo-quick", "--name", "{}", "--set", *LONG, "schedule=constant", "learning_rates=1e-3,1e-3"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_each_kind_ends_in_the_same_bytes(run_script, layout, kind):
    def train(name, flags):
        return [*map(str, layout.flags()), "--folds", "0", *(flag.format(name) for flag in flags)]

    flags, first = KINDS[kind]
    whole, killed = f"whole_{kind.replace(' ', '_')}", f"killed_{kind.replace(' ', '_')}"
    for name in (whole, killed) if first else ():
        run_script("04_train.py", *train(name, first))
    run_script("04_train.py", *train(whole, flags))
    kill_in_epoch(train(killed, flags), 45 if kind == "more cycles" else 5)
    assert not layout.network(killed, 0).with_name("best.pt.meta.json").exists()
    assert "resuming at epoch" in run_script("04_train.py", *train(killed, flags)).stdout
    assert layout.network(killed, 0).read_bytes() == layout.network(whole, 0).read_bytes()
    last = [load_checkpoint(layout.network(name, 0, "last")) for name in (whole, killed)]
    assert same(*last) and last[0]["epoch"] > 5


def kill_in_epoch(flags: list[str], epoch: int) -> None:
    """Start stage 04, which saves after every epoch, and kill it with SIGKILL after the line of an epoch."""
    hook = {"PYTHONPATH": str(ROOT / "tests" / "hooks"), "HOOK_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen(
        [sys.executable, "04_train.py", *flags],
        cwd=ROOT,
        env={**os.environ, **hook, "OMP_NUM_THREADS": "1", "LOKY_MAX_CPU_COUNT": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(f": epoch {epoch}/" in line for line in process.stdout), "it ended before the epoch"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
