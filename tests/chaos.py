"""Kill the stages at random moments, run each again, and check that the submission is the same, byte for byte.

example python tests/chaos.py --rounds 100 --seed 0 --jobs 2

A round runs all stages in a fresh folder. Each stage is killed up to three times at moments drawn from `seed`: after
some time, or after some changes in the work folder. Kinds of kills:

group   SIGKILL to the whole process group
main    SIGKILL to the stage's process; its workers must end by themselves
worker  SIGKILL to one of its worker processes
both    SIGKILL to a worker, and to the group shortly after
ctrl-c  SIGINT to the group
term    SIGTERM to the group
torn    SIGTERM to the stage's process alone

Then the same command must resume. A worker's death, Ctrl+C and SIGTERM must end in one message without a traceback,
within SECONDS_TO_END. At the end run_all.sh must find everything up to date. The last line is a JSON object. The exit
code is 1 if any submission differs or any kill ends badly.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from joblib import Parallel, delayed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.demo.data import make_demo_data  # noqa: E402
from tests.warm import Forked, Warm  # noqa: E402

RUN = "demo-quick"
TINY = (
    "--quick",
    "--recipes",
    "demo",
    "--set",
    "cycle_epochs=4",
    "--set",
    "max_cycles=1",
    "--set",
    "buffers=16",
    "--set",
    "finder=off",
    "--pretrained",
    "none",
)
SAME = ("submission.csv", "thresholds.json", "folds.csv", f"predictions/{RUN}/oof.npz", f"predictions/{RUN}/test.npz")
CODES = {
    "group": {-9},
    "main": {-9},
    "both": {-9, 2},
    "worker": {2},
    "ctrl-c": {130, -2},
    "term": {143, -15},
    "torn": {143, -15},
}
PYTHON_STARTS = ("init_import_site", "line 0, in <module>\nKeyboardInterrupt")  # before a script's first line
SECONDS_TO_END = 15  # on a busy machine
WARM = 0.75  # share of disturbed starts that load no packages, so that more rounds fit into an hour
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "tests" / "hooks"),
    "HOOK_CHECKPOINT_SECONDS": "0",
}


def run_all(data: Path, work: Path, *more) -> str:
    command = ["bash", "run_all.sh", "--data", str(data), "--work", str(work), *TINY, *more]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout


def stage_commands(data: Path, work: Path, parallel: bool) -> list[list[str]]:
    """Return run_all.sh's commands, with worker processes (for jobs or loading) in every stage that can have them."""
    long_jobs = ["--jobs", "2"] if parallel else ["--workers", "2"]
    workers = {"01": ["--jobs", "2"], "02": ["--jobs", "2"], "04": long_jobs, "05": long_jobs}
    commands = map(shlex.split, run_all(data, work, "--dry-run").splitlines())
    return [[sys.executable, *command[1:], *workers.get(command[1][:2], [])] for command in commands]


# --- killing -----------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the worker processes below a process: all except those that only clean up."""
    try:
        direct = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        own = [child for child in direct if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []
    return own + [below for child in own for below in children(child)]


def changes_mark(work: Path) -> int:
    """Return a number that changes with every file of a folder, including half-written ones."""
    return hash(tuple((entry.path, entry.stat().st_mtime_ns) for folder, *_ in os.walk(work) for entry in scan(folder)))


def scan(folder):
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_file()]
    except OSError:
        return []


def wait_for_moment(process, work: Path, seconds: float, changes: int | None) -> None:
    """Wait some seconds, or for that many changes in the work folder; at most until the process ends."""
    started, before = time.monotonic(), None
    while process.poll() is None and (changes is not None or time.monotonic() - started < seconds):
        if changes is not None:
            try:
                now = changes_mark(work)
            except OSError:  # deleted during the scan
                now = None
            changes -= now != before
            before = now
            if changes < 0:
                return
        time.sleep(0.002)


def kill(process, kind: str, rng: random.Random) -> bool:
    """Kill in one of the ways that the module's docstring lists; return False if nothing is left to kill."""
    try:
        if kind in ("worker", "both"):
            while not (found := children(process.pid)):
                if process.poll() is not None:
                    return False
                time.sleep(0.002)
            os.kill(rng.choice(found), signal.SIGKILL)
            time.sleep(rng.random() / 5)
        if kind in ("group", "both"):
            os.killpg(process.pid, signal.SIGKILL)
        if kind in ("main", "torn"):
            os.kill(process.pid, signal.SIGKILL if kind == "main" else signal.SIGTERM)
        if kind in ("ctrl-c", "term"):
            os.killpg(process.pid, signal.SIGINT if kind == "ctrl-c" else signal.SIGTERM)
    except ProcessLookupError:
        return False
    return process.poll() is None or process.returncode != 0


def start(command: list[str], output, warm: Warm | None) -> subprocess.Popen | Forked:
    """Start a stage in a session of its own, in a new Python or in a fork of one that has loaded torch."""
    if warm:
        return warm.start(command[1:], ENVIRONMENT, ROOT, [Path(output.name)] * 2, apart=True)
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stdout=output, stderr=output)


def disturbed(
    command: list[str], work: Path, kind: str, rng: random.Random, seconds: float, warm: Warm
) -> tuple[bool, str | None]:
    """Run a stage and kill it; return whether it was killed, and what went wrong."""
    with tempfile.NamedTemporaryFile("w+") as output:
        process = start(command, output, warm if rng.random() < WARM else None)
        wait_for_moment(process, work, rng.random() * seconds, rng.choice([None, rng.randrange(60)]))
        was_killed = process.poll() is None and kill(process, kind, rng)
        started = time.monotonic()
        try:  # the worker may have been a short-lived helper, and the stage continues
            process.wait(SECONDS_TO_END if was_killed and kind != "worker" else 600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - started
        quiet = leaves_files_alone(process.pid, work)
        output.seek(0)
        text = output.read()
    if was_killed and seconds > SECONDS_TO_END and process.returncode != 0:
        return True, f"still running {seconds:.0f} s after {kind}: {shlex.join(command)}\n{text}"
    if kind == "ctrl-c" and (any(part in text for part in PYTHON_STARTS) or before_main(process.returncode, text)):
        return True, None
    if process.returncode == 0:  # it was done, or did not need the killed process
        return False, None
    if (
        process.returncode not in CODES[kind]
        or not was_killed
        or (kind not in ("group", "main", "both") and "Traceback" in text)
    ):
        return True, f"ended with {process.returncode} after {kind}: {shlex.join(command)}\n{text}"
    if process.returncode in (130, -2, 143) and "To resume: python" not in text:
        return True, f"printed no command to resume after {kind}: {shlex.join(command)}\n{text}"
    return True, None if quiet else f"worker processes kept writing after {kind}: {shlex.join(command)}"


def before_main(code: int, text: str) -> bool:
    """Tell whether Ctrl+C came too early for `run` to turn it into a message: Python prints a traceback or nothing."""
    return code == -signal.SIGINT and (not text or text.endswith("\nKeyboardInterrupt\n") and "in main\n" not in text)


def leaves_files_alone(group: int, work: Path) -> bool:
    """Tell whether a folder stays unchanged once a group's main process has ended; kills the rest of the group."""
    try:
        os.killpg(group, 0)
        time.sleep(2)
        before = changes_mark(work)
        time.sleep(1)
        quiet = before == changes_mark(work)
        os.killpg(group, signal.SIGKILL)
        return quiet
    except ProcessLookupError:
        return True


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


# --- rounds ------------------------------------------------------------------------------------------------


def play(
    data: Path, work: Path, rng: random.Random, seconds: dict[str, float], warm: Warm
) -> tuple[Counter, list[str]]:
    """Go through all stages once with random kills; return the number of kills of each kind, and what went wrong."""
    kills, problems = Counter(), []
    for command in stage_commands(data, work, rng.random() < 0.5):
        stage = command[1][:2]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            kinds = sorted(CODES if stage in ("01", "02", "04", "05") else CODES.keys() - {"worker", "both"})
            kind = rng.choice(kinds)
            was_killed, problem = disturbed(command, work, kind, rng, seconds[stage], warm)
            kills[f"{stage} {kind}"] += was_killed
            problems += [problem] if problem else []
        result = warm.run(command[1:], ENVIRONMENT, ROOT, work.parent / f"{work.name}.output")
        if result.returncode:
            return kills, [*problems, f"cannot resume: {shlex.join(command)}\n{result.stdout}{result.stderr}"]
    again = run_all(data, work)
    return kills, problems + ([f"not all is up to date:\n{again}"] if "making" in again else [])


def play_round(
    number: int, seed: int, data: Path, whole: Path, seconds: dict[str, float]
) -> tuple[Counter, list[str], bool]:
    """Play a round in its own folder; return the kills, what went wrong, and whether its files equal `whole`'s."""
    work, warm = whole.parent / f"round{number}", Warm(ENVIRONMENT)
    (work.parent / f"{work.name}.output").mkdir()
    try:
        kills, problems = play(data, work, random.Random(f"{seed} {number}"), seconds, warm)
    finally:
        warm.close()
    differing = [name for name in SAME if content(work / name) != content(whole / name)]
    return (
        kills,
        [f"round {number}: {problem}" for problem in problems + [f"{name} differs" for name in differing]],
        not differing,
    )


def undisturbed(data: Path, work: Path) -> dict[str, float]:
    """Run all stages; return how many seconds each takes."""
    seconds = {}
    for command in stage_commands(data, work, True):
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        seconds[command[1][:2]] = time.monotonic() - started
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=1, help="rounds at once; kills are drawn per round, whatever the number"
    )
    parser.add_argument("--work", type=Path, help="an empty or new folder to work in (default: a temporary one)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore Ctrl+C
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.work or Path(temporary)).resolve()
        data, whole = place / "data", place / "whole"
        make_demo_data(data, n_train=32, n_test=6)
        seconds, kills, identical, problems = undisturbed(data, whole), Counter(), 0, []
        rounds = Parallel(args.jobs, backend="threading", return_as="generator_unordered")(
            delayed(play_round)(number, args.seed, data, whole, seconds) for number in range(args.rounds)
        )
        for done, (round_kills, found, same) in enumerate(rounds, start=1):
            kills += round_kills
            identical += same
            problems += found
            print(
                f"{done}/{args.rounds} rounds: {sum(kills.values())} kills so far, this submission "
                f"{'identical' if same else 'differs'}",
                *found,
                sep="\n",
                flush=True,
            )
    by_stage = {
        stage: {key.split()[1]: n for key, n in sorted(kills.items()) if key.startswith(stage)} for stage in seconds
    }
    print(
        json.dumps(
            {
                "rounds": args.rounds,
                "seed": args.seed,
                "kills": sum(kills.values()),
                "kills_per_stage": by_stage,
                "identical": identical,
                "problems": len(problems),
            }
        )
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
