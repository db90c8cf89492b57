"""Reproduce the paper's Tables 1 to 3, step by step of the method, from out-of-fold predictions of each step's run.

reads   WORK/predictions/<run>/fold<k>_oof.npz of each run of the recipes, WORK/folds.csv
writes  WORK/tables/tables.md    the three tables beside the paper's figures, gains with intervals, notes; also printed
        WORK/tables/table1.csv, table2.csv, table3.csv   the same, a row per model and fold
        WORK/tables/tables.csv   the same, a row per cell
        WORK/tables/gains.csv    model, column, against, gain, low, high, paper, n_folds, n_samples

example python 09_tables.py --work work --recipes resnet50,gapnet_pl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.errors import UserError, command, listing
from common.process import command_line
from common.process.main import run
from common.recipes import ablation_runs


def parse_args():
    parser = command_line.parser(__doc__)
    command_line.add_recipes_flag(parser, "systems to show")
    parser.add_argument("--folds", type=command_line.fold_numbers, metavar="0,2", help="folds to score (default: all)")
    parser.add_argument("--partial", action="store_true", help="show '-' where a run has no predictions")
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.artifacts.experiments import read_experiments
    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage, digest
    from common.score import paper_tables

    layout = Layout(args.work, args.data)
    experiments = read_experiments(layout)
    systems = {recipe: ablation_runs(recipe, experiments) for recipe in args.recipes}
    rows = paper_tables.validation_rows(layout.read_folds(), args.folds)
    files = paper_tables.prediction_files(
        args.work, {run for runs in systems.values() for run in runs.values()}, sorted(set(rows["fold"]))
    )
    missing = paper_tables.missing_runs(systems, files)
    if missing and not args.partial:
        raise UserError(
            f"runs are missing; run: {rerun(args, missing)}\n"
            f"or give --partial to leave these columns empty:\n{listing(sum(missing.values(), []))}"
        )
    files = {run: paths for run, paths in sorted(files.items()) if all(path.is_file() for path in paths.values())}
    paper_tables.check_same_views(files)
    stage = Stage(
        "09_tables",
        layout.tables / "tables.md",
        {"recipes": args.recipes, "folds": sorted(map(int, set(rows["fold"])))},
        {
            "folds.csv": layout.folds,
            "missing runs": digest(missing),
            **{f"{run}/{path.name}": path for run, paths in files.items() for path in paths.values()},
        },
    )
    if stage.is_current():
        stage.say_current()
    else:
        probs = {run: paper_tables.load_run(paths, rows, rerun(args, args.recipes)) for run, paths in files.items()}
        scores, gains = paper_tables.score_systems(systems, probs, rows)
        write(stage, scores, gains, paper_tables.notes(systems, missing, rows))
    print("\n" + stage.artifact.read_text(encoding="utf-8"), end="")


def rerun(args, recipes):
    return command("run_all.sh", "--tables", "--recipes", ",".join(recipes), "--data", args.data, "--work", args.work)


def write(stage, scores, gains, remarks):
    """Write the tables in all formats."""
    from common.artifacts.files import write_text
    from common.artifacts.tables import write_csv
    from common.score import paper_tables

    frames = {
        "tables.csv": scores,
        "gains.csv": gains,
        **{f"table{table}.csv": paper_tables.wide_table(scores, gains, table) for table in paper_tables.HEADINGS},
    }
    files = {stage.artifact.with_name(name): frame for name, frame in frames.items()}
    with stage.making() as record:
        for path, frame in files.items():
            write_csv(path, frame.round(6))
        write_text(stage.artifact, paper_tables.markdown(scores, gains, remarks))
        record.rows, record.also = len(scores), list(files)


if __name__ == "__main__":
    run(main)
