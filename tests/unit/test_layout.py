"""The layout of a work folder: every path in it, and commands that name the given folders."""

from pathlib import Path

import pytest

from common.artifacts.layout import Layout
from common.errors import UserError


def test_paths_are_where_the_readme_says():
    layout = Layout(Path("w"))
    assert layout.samples == Path("w/samples.csv")
    assert layout.store("768") == Path("w/images/768") and layout.store_table("768") == Path("w/images/768.csv")
    assert layout.network("resnet50", 2) == Path("w/runs/resnet50/fold2/best.pt")
    assert layout.network("resnet50", 2, "last") == layout.run("resnet50", 2) / "last.pt"
    assert layout.predictions("resnet50", "test") == Path("w/predictions/resnet50/test.npz")
    assert layout.predictions("resnet50", "oof", 0) == Path("w/predictions/resnet50/fold0_oof.npz")


def test_commands_name_the_input_folder_where_it_is_not_the_default():
    assert Layout(Path("w")).command("03_make_folds.py") == "python 03_make_folds.py --work w"
    assert Layout(Path("w"), Path("data")).flags() == ["--work", "w"]
    assert Layout(Path("my work"), Path("d")).command("04_train.py", "--folds", 1) == (
        "python 04_train.py --data d --work 'my work' --folds 1"
    )


@pytest.mark.parametrize(
    ("read", "script"),
    [
        (Layout.read_samples, "01_preprocess.py"),
        (Layout.read_duplicates, "02_dedup.py"),
        (Layout.read_pairs, "02_dedup.py"),
        (Layout.read_folds, "03_make_folds.py"),
    ],
)
def test_a_missing_table_names_its_stage(tmp_path, read, script):
    with pytest.raises(UserError, match=rf"is missing; run: python {script} --data d --work {tmp_path}$"):
        read(Layout(tmp_path, Path("d")))


def test_runs_with_predictions_are_found(tmp_path):
    layout = Layout(tmp_path)
    for name in ("b", "a"):
        layout.predictions(name, "oof").parent.mkdir(parents=True)
        layout.predictions(name, "oof").touch()
    layout.predictions("c", "test").parent.mkdir(parents=True)
    assert layout.predicted_runs() == ["a", "b"]
