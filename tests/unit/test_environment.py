from importlib import metadata

import pytest

from common.process import requirements
from common.process.requirements import next_install, pins, unmet
from tests.conftest import ROOT


def test_what_is_missing_or_out_of_range_is_named(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\nnumpy>=1.0  # fine\nnumpy<1.0\nno-such-package>=2\n")
    problems = unmet([str(path)])
    assert len(problems) == 2
    assert problems[0].startswith("numpy: expected <1.0, found ")
    assert problems[1] == "no-such-package: expected >=2, found nothing"


def test_the_python_of_the_tests_has_all():
    assert unmet([str(ROOT / "requirements.txt"), str(ROOT / "tests" / "requirements.txt")]) == []


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, ["-r", "FILE"]),
        ({"torch": "2.5.1", "torchvision": "0.20.1", "captum": "0.9.0"}, ["-r", "FILE"]),
        ({"torch": "2.6.0+cu124", "numpy": "1.26.4"}, ["-r", "FILE"]),
        ({"torch": "2.6.0+cu124", "torchvision": "0.21.0"}, ["--no-deps", "captum<1,>=0.7"]),
        (
            {"torch": "2.6.0", "torchvision": "0.21.0", "captum": "0.9.0"},
            ["numpy>=1.26", "opencv-python-headless>=4.9", "numpy<2", "munch"],
        ),
        (
            {
                "torch": "2.6.0",
                "torchvision": "0.21.0",
                "captum": "0.9.0",
                "numpy": "1.26.4",
                "munch": "4.0",
                "opencv-python": "4.11",
            },
            [],
        ),
    ],
)
def test_what_pip_is_to_install_next(tmp_path, monkeypatch, there, expected):
    def version(name):
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(requirements.metadata, "version", version)
    monkeypatch.setattr(
        requirements.metadata, "requires", lambda name: ["torch>=1.10", "numpy<2", "munch", 'pytest; extra == "test"']
    )
    path = tmp_path / "requirements.txt"
    path.write_text("torch>=2.6,<3\ntorchvision>=0.21\ncaptum>=0.7,<1\nnumpy>=1.26\nopencv-python-headless>=4.9\n")
    assert next_install([str(path)]) == [str(path) if argument == "FILE" else argument for argument in expected]
    if not expected:
        assert pins([str(path)]) == [
            "torch==2.6.0",
            "torchvision==0.21.0",
            "captum==0.9.0",
            "numpy==1.26.4",
            "opencv-python==4.11",
        ]
