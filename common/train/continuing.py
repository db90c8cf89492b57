"""More cycles for finished trainings: their state becomes that of unfinished ones, which are then resumed."""

from contextlib import ExitStack
from dataclasses import replace

import pandas as pd

from common.artifacts.layout import Layout
from common.errors import UserError, listing
from common.recipes import continued_of, run_parameters, to_dict
from common.train.checkpoints import check_unfinished, load_checkpoint, made_from, restoring, save_checkpoint
from common.train.distributed import Team
from common.train.jobs import Job, Request, every_job
from common.train.run import FORMAT
from common.train.schedules import has_ended, schedule_of


def continue_trainings(request: Request, folds: pd.DataFrame, team: Team, cycles: int) -> None:
    """Give trainings, finished or already continued, this many cycles beyond the end that they first had.

    That is a total: the same command again changes nothing.

    Raises UserError, before anything is changed, that names all trainings that cannot get more cycles.
    """
    jobs = every_job(request, folds, team)
    if team.is_main:
        continue_jobs(jobs, cycles)
    team.agree("continued")


def continue_jobs(jobs: list[Job], cycles: int) -> None:
    """Do as `continue_trainings` says, for these jobs."""
    with ExitStack() as locks:
        for job in jobs:
            locks.enter_context(job.stage.lock())
        refused = [f"{job.label}: {reason}" for job in jobs if (reason := why_not(job, cycles))]
        if refused:
            raise UserError(f"--more-cycles continues finished trainings from last.pt; not these:\n{listing(refused)}")
        for job in jobs:
            continue_training(job, cycles)


def why_not(job: Job, cycles: int) -> str | None:
    """Return why a training cannot get more cycles; None if it can, or has them already."""
    train = Layout(job.work).command("04_train.py", "--recipe", job.name, "--folds", job.fold)
    path = job.folder / "last.pt"
    if not made_from(job.folder):
        return f"it has not begun; run: {train}"
    try:
        check_unfinished(job.stage)
    except UserError as error:
        return str(error)
    if has_them(job, cycles):
        return None
    if not path.is_file():
        return (
            f"{path} no longer exists; a new training can start from its network: --name NAME --start-from {job.name}"
        )
    saved = load_checkpoint(path)
    with restoring(path):
        losses = [row["valid_loss"] for row in saved["history"] if "valid_loss" in row]
        epoch, step, before = saved["epoch"], saved["step"], saved.get("continued", [])
    if not epoch or step or not has_ended(job.recipe, epoch, losses, before):
        return f"it is not finished, but in epoch {epoch + 1}; run: {train}"
    return schedule_of(job.recipe).why_no_more(job.recipe, losses)


def has_them(job: Job, cycles: int) -> bool:
    """Tell whether a training already has this many cycles beyond its first end."""
    continued = continued_of(job.stage.parameters)
    return continued is not None and job.recipe.max_cycles >= total(job, continued["after"][0], cycles)


def total(job: Job, first_end: int, cycles: int) -> int:
    """Return the maximum of cycles of a training that first ended after `first_end` epochs and gets more."""
    return -(-first_end // job.recipe.cycle_epochs) + cycles


def continue_training(job: Job, cycles: int) -> None:
    """Make a finished training an unfinished one with more cycles.

    The sidecar goes first: killed in between, the training counts as it was before, and the same command continues.
    """
    before = continued_of(job.stage.parameters) or {"asked": job.recipe.max_cycles, "after": []}
    if has_them(job, cycles):
        return print(
            f"{job.label}: already has --more-cycles {cycles}, counted from its first end after {before['after'][0]} "
            "epochs; give a larger number for further ones"
        )
    saved = load_checkpoint(job.folder / "last.pt")
    after = [*before["after"], saved["epoch"]]
    recipe = replace(job.recipe, max_cycles=total(job, after[0], cycles))
    made = {
        "parameters": run_parameters(recipe, job.fold, job.seed, FORMAT, {**before, "after": after}),
        "inputs": job.stage.inputs,
    }
    job.stage.sidecar.unlink(missing_ok=True)
    changes = {"recipe": to_dict(recipe), "continued": after, "made_from": made}
    save_checkpoint(job.folder / "last.pt", {**saved, **changes})
    print(f"{job.label}: ended after {saved['epoch']} epochs, and continues to at most {recipe.epochs}", flush=True)
