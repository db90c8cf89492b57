"""A Python that loads the large packages once and runs the project's scripts in forks of itself.

Each script has its own process, as it does for a user: its own __main__, arguments, environment, output and end, and
Python's own hooks. This saves only the seconds that torch and other packages take to load and to free. conftest.py
and chaos.py start this file; each line of its input is a request, answered by two lines: the process, its exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# None of the project's modules, nor OpenCV, which reads the project's limits when it is loaded.
PACKAGES = (
    "faiss",
    "imagehash",
    "iterstrat.ml_stratifiers",
    "joblib",
    "matplotlib.figure",
    "pandas",
    "scipy.optimize",
    "scipy.stats",
    "scipy.sparse.csgraph",
    "tifffile",
    "torch",
    "torch.utils.data",
    "torchvision.models",
    "tqdm",
)
# Settings that Python and these packages read when they start.
READ_AT_START = ("PYTHON", "LANG", "LC_", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")


class Warm:
    """The client: starts such a Python with the first script, in the current environment; `close` ends it."""

    def __init__(self, environment: dict | None = None):
        self.process = None
        self.environment = dict(environment or os.environ)

    def run(self, command: list[str], environment: dict, cwd: Path, folder: Path) -> subprocess.CompletedProcess:
        """Run `command`, a script of the project and its arguments; its output is kept in `folder` for a moment."""
        if settings_at_start(environment) != settings_at_start(self.environment):  # it needs another Python
            return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
        places = [folder / name for name in ("stdout", "stderr")]
        code = self.start(command, environment, cwd, places).wait()
        return subprocess.CompletedProcess(command, code, *(place.read_text() for place in places))

    def start(self, command: list[str], environment: dict, cwd: Path, output: list[Path], apart=False) -> "Forked":
        """Start `command` as `run` does, and return its process; the next one starts after it has ended.

        apart : in a session of its own
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=ROOT,
                env=self.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        request = {"command": command, "environment": environment, "cwd": str(cwd), "output": list(map(str, output))}
        self.process.stdin.write(json.dumps(request | {"apart": apart}) + "\n")
        self.process.stdin.flush()
        return Forked(command, self.process.stdout)

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()


class Forked:
    """A process that a warm Python started, with what `subprocess.Popen` has for it: pid, returncode, poll, wait."""

    def __init__(self, command: list[str], answers):
        self.command, self.pid, self.returncode = command, int(answers.readline()), None
        self.waiting = threading.Thread(target=self.receive, args=[answers], daemon=True)
        self.waiting.start()

    def receive(self, answers) -> None:
        self.returncode = int(answers.readline())

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.waiting.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        return self.returncode


def settings_at_start(environment: dict) -> dict:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


def next_script() -> dict:
    """Answer requests until the input ends; in each fork, return its request."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        process = os.fork()
        if not process:
            return json.loads(line)
        print(process, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)
    sys.exit()


def become(request: dict) -> None:
    """Turn this process into a new Python that begins with a script."""
    if request["apart"]:
        os.setsid()
    for number, name in enumerate((os.devnull, *request["output"])):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv[:] = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run() -> None:
    """Run the script and end as Python does, without freeing every object."""
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:  # Python ends by the signal then
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    assert threading.active_count() == 1, threading.enumerate()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # about forks while a library has threads
    gc.freeze()  # forks share these objects, so they need not scan them
    become(next_script())
    run()
