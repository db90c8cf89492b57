"""A short run of chaos.py; start a long one by hand: python tests/chaos.py --rounds 100"""

import json
import subprocess
import sys

from tests.conftest import ROOT


def test_stages_that_are_killed_at_random_end_in_the_same_submission(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "chaos.py"), "--rounds", "2", "--work", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["identical"] == report["rounds"] == 2 and report["kills"] > 5 and report["problems"] == 0
