"""Scripts in forks of a warm Python behave like those in a fresh one: how they end, print and see their environment."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = {
    "its end": "import sys\nprint('done')\nsys.exit(3)\n",
    "an error": "import sys\nprint('out', flush=True)\nprint('err', file=sys.stderr)\n1 / 0\n",
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "its surroundings": "import os, sys\nprint(__name__, sys.argv, sys.path[0], os.getcwd(), sys.stdin.read())\n"
    "print(os.environ['OF_TEST'], 'common' in sys.modules)\n",
    "what comes last": "import atexit, threading, time\natexit.register(print, 'last')\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print('later'))).start()\n",
    "its hook": "import sys\nsys.excepthook = lambda *error: print('hook', error[0].__name__)\nraise KeyError\n",
    "a process": "import multiprocessing\nif __name__ == '__main__':\n"
    "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n        print(pool.map(abs, [-1, 2]))\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork_is_like_a_new_python(warm, tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[name])
    environment = {**os.environ, "OF_TEST": "x y\nz"}
    ours = warm.run([str(script), "a b"], environment, ROOT, tmp_path)
    python = subprocess.run(
        [sys.executable, str(script), "a b"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (ours.returncode, ours.stdout) == (python.returncode, python.stdout)
    assert ours.stderr.splitlines()[-1:] == python.stderr.splitlines()[-1:]  # the last line of a traceback


def test_settings_that_python_reads_when_it_starts_have_a_python_of_their_own(warm, tmp_path):
    (tmp_path / "script.py").write_text("import sys\nprint(sys.flags.optimize)\n")
    for more, level in (({}, 0), ({"PYTHONOPTIMIZE": "2"}, 2)):
        assert warm.run([str(tmp_path / "script.py")], {**os.environ, **more}, ROOT, tmp_path).stdout == f"{level}\n"
