"""The project's own rules: what runs without torch, how long scripts are. tests/lint.sh checks imports."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(ROOT.glob("[01][0-9]_*.py"))


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"common.{name.name}" for name in node.names] if node.module == "common" else [node.module])
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_every_module_is_in_a_room_that_says_what_it_is_for():
    common = ROOT / "common"
    assert sorted(path.stem for path in common.glob("*.py")) == [
        "__init__",
        "classes",
        "errors",
        "experiments",
        "pipeline",
        "recipes",
    ]
    for room in {path.parent for path in common.glob("*/*.py")}:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), room


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_import_no_other(path):
    assert len(path.read_text().splitlines()) <= 140
    assert all(
        module.startswith("common") or module in sys.stdlib_module_names or module in ("numpy", "pandas")
        for module in imports(path)
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_what_is_read_and_written_without_torch(path):
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'pandas' not in sys.modules or 'thresholds' in sys.argv[0]"  # its --help lists the methods
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folders = ("--data DIR", "--work DIR") if path.name.startswith("0") else ("--model MODEL", "--out")
    assert all(word in result.stdout for word in ("reads", "writes", "example python", *folders))


def test_the_page_is_made_without_torch():
    code = "import sys, common.report.build, common.report.sample, sklearn.metrics; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
