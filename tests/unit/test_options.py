"""The defaults of flags: the check has those of the stages, and each is declared only once."""

import runpy
import sys
from dataclasses import asdict

import pytest

from common.data.options import FOLDS, WHOLE, FoldOptions, fold_options, ingest_options
from tests.conftest import ROOT


def defaults(monkeypatch, script) -> dict:
    """Return the default values of a script's flags."""
    monkeypatch.setattr(sys, "argv", [script])
    return vars(runpy.run_path(str(ROOT / script))["parse_args"]())


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("01_preprocess.py", "data work recipes settings limit keep_going white_level black_level store jobs cluster"),
        ("03_make_folds.py", "n_folds"),
        ("04_train.py", "settings folds pretrained weights_dir"),
        ("05_predict_oof.py", "folds tta no_test"),
    ],
)
def test_the_check_assumes_what_the_stages_do(monkeypatch, script, flags):
    check, stage = defaults(monkeypatch, "common/check/__main__.py"), defaults(monkeypatch, script)
    assert {name: check[name] for name in flags.split()} == {name: stage[name] for name in flags.split()}


def test_without_flags_the_options_are_their_defaults(monkeypatch):
    args = runpy.run_path(str(ROOT / "03_make_folds.py"))["parse_args"]
    monkeypatch.setattr(sys, "argv", ["03_make_folds.py"])
    assert fold_options(args()) == FOLDS == FoldOptions()
    monkeypatch.setattr(sys, "argv", ["01_preprocess.py"])
    options = ingest_options(runpy.run_path(str(ROOT / "01_preprocess.py"))["parse_args"]())
    assert {**asdict(options), "recipes": list(options.recipes)} == {
        "recipes": ["resnet50"],
        "levels": WHOLE,
        "keep_going": False,
        "raw": False,
        "limit": None,
    }
