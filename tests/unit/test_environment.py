from common.environment import unmet
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

