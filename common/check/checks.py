"""Check everything before days are spent: what is fine, what will fail and how to fix it, and what a run will take.

Each check yields lines; it writes only temporary files, which it deletes. This module loads only the standard library,
so that missing packages can be reported like the rest: `later` loads each other check when it is run.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.check.lines import FAILS, FINE, WARNING, Check, Checks, T
from common.errors import UserError
from common.process.main import explain, stop_behind
from common.process.requirements import unmet

if TYPE_CHECKING:
    from common.check.costs import Cost

ROOT = Path(__file__).resolve().parents[2]


def examine(args: argparse.Namespace) -> None:
    """Print all checks as they are done; raises UserError if something will fail.

    args : see `common.check.__main__`
    """
    print(f"before a run of {', '.join(args.recipes)} on {args.data} in {args.work}:", flush=True)
    states: Counter[str] = Counter()
    for check in checks(args):
        print(check, flush=True)
        states[check.state] += 1
    if states[FAILS]:
        raise UserError(f"{states[FAILS]} of these will fail; fix them as described after '->'")
    print(f"no check failed; warnings: {states[WARNING]}")


def checks(args: argparse.Namespace) -> Iterator[Check]:
    """Yield everything that is known before a run, step by step; what cannot be checked is left out."""
    yield from guarded("packages", packages())
    yield from guarded("hardware", later("machine", "hardware"))
    yield from guarded("work folder", later("work_folder", "work_folder", args.work))
    seen = yield from guarded("input", later("inputs", "look_at_input", args))
    if not seen:
        yield Check(
            "and the rest", WARNING, "labels, weights, memory, disk and time are checked once the input is fixed"
        )
        return
    folds = yield from guarded("labels", later("inputs", "labels", args, seen))
    yield from guarded("weights", later("trainings", "weights", args, seen))
    yield from guarded("work so far", later("trainings", "work_so_far", args, seen))
    if folds is None:
        return
    costs: dict[str, Cost] = {}
    for name, recipe in seen.recipes.items():
        print(f"measuring steps of {name}; this takes at most a minute on most machines", file=sys.stderr, flush=True)
        cost = yield from guarded(f"memory, {name}", later("machine", "memory", name, recipe, args))
        costs |= {name: cost} if cost else {}
    yield from guarded("disk", later("estimates", "disk", args, seen, folds, costs))
    yield from guarded("time", later("estimates", "times", args, seen, folds, costs))


def later(module: str, check: str, *arguments: object) -> Checks[Any]:
    """Run a check of another module of this package, which is loaded only now."""
    return (yield from getattr(import_module(f"common.check.{module}"), check)(*arguments))


def guarded(name: str, check: Checks[T]) -> Checks[T | None]:
    """Run one check; an error that ends it, or a missing package, becomes its last line."""
    try:
        return (yield from check)
    except UserError as error:
        yield Check(name, FAILS, str(error))
    except ImportError as error:
        if stop_behind(error):
            raise
        yield Check(name, FAILS, f"the package {error.name or error} cannot be imported", "see packages")
    except OSError as error:
        yield Check(name, FAILS, f"{error.filename or ''}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        if stop_behind(error) or not (message := explain(error)):
            raise
        yield Check(name, FAILS, message)
    return None


def packages() -> Checks[None]:
    """Compare Python and its packages with requirements.txt."""
    path = ROOT / "requirements.txt"
    problems = unmet([str(path)])
    for problem in problems:
        missing = problem.endswith("found nothing") or problem.startswith("python:")
        yield Check(
            "packages",
            FAILS if missing else WARNING,
            problem,
            f"bash run_all.sh makes a .venv with all of them; or run: {sys.executable} -m pip install -r {path}",
        )
    if not problems:
        yield Check("packages", FINE, f"Python {sys.version.split()[0]} has all that requirements.txt asks for")
