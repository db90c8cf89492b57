#!/usr/bin/env bash
# From raw images to submission.csv and a page to look at: all stages in order. What is up to date is left alone.
# Without data at hand it makes demo data and runs on that.
set -eo pipefail
{ true >&1; } 2>/dev/null || exec >/dev/null  # where the output was closed, it goes nowhere
{ true >&2; } 2>/dev/null || exec 2>/dev/null
unset PYTHONSAFEPATH  # python -m needs the project's folder

usage() {
    cat <<'TEXT'
usage: bash run_all.sh [--data DIR] [--work DIR] [--recipes a,b] [--folds 0,1,2,3,4] [--set FIELD=VALUE ...]
                       [--pretrained auto|none|FILE] [--weights-dir DIR] [--device D] [--precision P] [--jobs N]
                       [--workers N] [--fast] [--white-level V] [--black-level V] [--store raw] [--quick] [--tables]
                       [--keep-going] [--dry-run] [--check]

  --data DIR     input in the competition's layout (default: data; where that is missing, demo data is made)
  --work DIR     folder for everything that is made (default: work)
  --recipes a,b  networks to train and average (default: resnet50; on demo data: demo,demo_large); all of them:
                 python 04_train.py --list-recipes
  --folds 0,1    folds to train (default: all five; on demo data three)
  --set F=V ...  change fields of every recipe, as in stage 04; may be repeated
  --quick        a run of minutes on a CPU to see that everything works: sizes divided by 8, few epochs,
                 two folds, at most 1000 training samples, no test-time views
  --tables       train what the paper's Tables 1, 2 and 3 compare (every variant of each recipe) and write the tables
                 in place of a submission; the same as bash run_tables.sh
  --keep-going   leave out samples with missing or bad files, by name, as stage 01 does
  --pretrained X weights to start from: auto (default), none, or a file
  --weights-dir DIR  where published weights lie or are downloaded to (default: torch's cache)
  --device D     where networks run: auto (default: all GPUs, or the CPU), cuda, cuda:1, cpu
  --precision P  auto (default), fp32, bf16 or fp16
  --jobs N       folds to train and predict at once (default: the number of GPUs, 1 on a CPU; on demo data 2)
  --workers N    loader processes of each of them (default: its share of the cores on a GPU, 0 on a CPU)
  --fast         the fastest kernels of a GPU, whose last digits differ from run to run
  --white-level V, --black-level V  values of 16-bit files that become 255 and 0 (stage 01 warns where they are needed)
  --store raw    store large images uncompressed: four times the room, read three times as fast by stages 04 and 05
  --dry-run      print the commands, each one pasteable, and run nothing
  --check        make nothing: say what will fail and how to mend it, and what time and room the run will take

example: bash run_all.sh --data data --work work --recipes resnet50 --folds 0,1,2,3,4
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
caller=$PWD
data='' work=work recipes='' folds='' quick=false tables=false dry=false check=false keep_going=() settings=() pretrained='' weights_dir=''
weights=() hardware=() jobs=() levels=()
flags=(--data --work --recipes --folds --set --quick --pretrained --weights-dir --device --precision --jobs --workers --fast --tables
    --white-level --black-level --store --keep-going --dry-run --check --help)

fail() { echo "error: $1" >&2; exit 2; }

# What the user is told to call again: after Ctrl+C here, once, whatever it met; after SIGTERM by the stage that has saved.
RUN_ALL_COMMAND=$(printf '%q ' bash "${BASH_SOURCE[0]}" "$@" | sed 's/\\,/,/g; s/ $//')
export RUN_ALL_COMMAND
trap 'exit 130' INT
trap '[ $? -ne 130 ] || printf "\nstopped; finished work is kept. To go on: %s\n" "$RUN_ALL_COMMAND" >&2' EXIT

while [ $# -gt 0 ]; do
    case $1 in
        --data | --work | --recipes | --folds | --set | --pretrained | --weights-dir | --device | --precision | --jobs | --workers | --white-level | --black-level | --store) [ -n "${2:-}" ] || fail "$1 needs a value" ;;
    esac
    case $1 in
        --data) data=$2; shift 2 ;;
        --work) work=$2; shift 2 ;;
        --recipes) recipes=$2; shift 2 ;;
        --folds) folds=$2; shift 2 ;;
        --set)
            shift
            [[ $1 != -* ]] || fail "--set needs a value, found $1"
            while [ $# -gt 0 ] && [[ $1 != -* ]]; do settings+=("$1"); shift; done
            ;;
        --pretrained) pretrained=$2; shift 2 ;;
        --weights-dir) weights_dir=$2; shift 2 ;;
        --device | --precision | --workers) hardware+=("$1" "$2"); shift 2 ;;
        --jobs) jobs=("$1" "$2"); shift 2 ;;
        --fast) hardware+=("$1"); shift ;;
        --white-level | --black-level | --store) levels+=("$1" "$2"); shift 2 ;;
        --quick) quick=true; shift ;;
        --tables) tables=true; shift ;;
        --keep-going) keep_going=(--keep-going); shift ;;
        --dry-run) dry=true; shift ;;
        --check) check=true; shift ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument $1; $(cd "$here" && python3 -c '
import sys
from common.errors import nearest
print(nearest(sys.argv[1], sys.argv[2:]))' "$1" "${flags[@]}" 2>/dev/null || echo "known: ${flags[*]}")" ;;
    esac
done

# Paths are the caller's; the commands are printed and run in the project's folder.
absolute() { case $1 in /*) printf '%s' "$1" ;; *) [ "$caller" = "$here" ] && printf '%s' "$1" || printf '%s' "$caller/$1" ;; esac; }
work=$(absolute "$work")
[ -z "$data" ] || data=$(absolute "$data")
case $pretrained in
    '') ;;
    auto | none) weights=(--pretrained "$pretrained") ;;
    *)
        weights=(--pretrained "$(absolute "$pretrained")")
        $dry || [ -f "${weights[1]}" ] || fail "--pretrained $pretrained: there is no such file"
        ;;
esac
[ -z "$weights_dir" ] || weights+=(--weights-dir "$(absolute "$weights_dir")")
cd "$here"

run() {
    if $dry; then printf '%q ' "$@" | sed 's/\\,/,/g; s/ $//'; echo; else "$@"; fi
}

n_folds=5 demo=false limit=() views=()
if [ -z "$data" ]; then
    data=data
    if [ ! -e data ]; then
        demo=true data=$work/demo_data n_folds=3
        [ ${#jobs[@]} -gt 0 ] || jobs=(--jobs 2)
    fi
fi
if [ -z "$recipes" ]; then
    case $demo,$tables in
        true,false) recipes=demo,demo_large ;;
        true,true) recipes=demo,demo_gapnet ;;
        false,false) recipes=resnet50 ;;
        false,true) recipes=resnet50,gapnet_pl ;;
    esac
fi
if $quick; then
    recipes=$(sed 's/,/-quick,/g; s/$/-quick/' <<<"$recipes")
    n_folds=2 limit=(--limit 1000) views=(--tta none)
fi
folds=${folds:-$(seq -s, 0 $((n_folds - 1)))}
seen=,
IFS=, read -ra numbers <<<"$folds,"
for fold in "${numbers[@]}"; do
    [[ $fold =~ ^[0-9]+$ && $seen != *,$fold,* ]] && [ "$fold" -lt "$n_folds" ] || \
        fail "--folds must be distinct numbers from 0 to $((n_folds - 1)) separated by commas, found $folds"
    seen+=$fold,
done
changes=()
[ ${#settings[@]} -eq 0 ] || changes=(--set "${settings[@]}")

if $dry || $check; then source common/setup.sh --dry-run requirements.txt; else source common/setup.sh requirements.txt; fi
if $check && [ ! -x "$PYTHON" ]; then PYTHON=python3; fi
if $check && $demo && [ ! -e "$data/train.csv" ]; then
    data=$(mktemp -d)
    trap 'rm -rf "$data"' EXIT
fi
places=(--data "$data" --work "$work")
# A check goes on without packages to draw with, and says which are missing.
if $demo && { ! $check || "$PYTHON" -c 'import common.demo.data' 2> /dev/null; }; then
    run "$PYTHON" -m common.demo --data "$data"
fi
runs=$recipes parts=()
if $tables; then
    parts=(--no-test)
    runs=$("$PYTHON" -c '
import sys
from common.process.main import run
from common.recipes import ablation_runs
run(lambda: print(",".join(run for name in sys.argv[1].split(",") for run in ablation_runs(name).values())))' "$recipes")
fi
if $check; then
    "$PYTHON" 01_preprocess.py --check "${places[@]}" --recipes "$runs" --folds "$folds" --n-folds "$n_folds" "${limit[@]}" \
        "${keep_going[@]}" "${views[@]}" "${parts[@]}" "${weights[@]}" "${levels[@]}" "${changes[@]}"
    exit
fi
run "$PYTHON" 01_preprocess.py "${places[@]}" --recipes "$runs" "${limit[@]}" "${levels[@]}" "${keep_going[@]}" "${changes[@]}"
run "$PYTHON" 02_dedup.py "${places[@]}"
run "$PYTHON" 03_make_folds.py "${places[@]}" --n-folds "$n_folds"
run "$PYTHON" 04_train.py "${places[@]}" --recipe "$runs" --folds "$folds" "${hardware[@]}" "${jobs[@]}" "${weights[@]}" "${changes[@]}"
run "$PYTHON" 05_predict_oof.py "${places[@]}" --recipes "$runs" --folds "$folds" "${hardware[@]}" "${jobs[@]}" "${views[@]}" "${parts[@]}"
if $tables; then
    run "$PYTHON" 09_tables.py "${places[@]}" --recipes "$recipes" --folds "$folds"
else
    run "$PYTHON" 06_thresholds.py "${places[@]}" --recipes "$recipes"
    run "$PYTHON" 07_ensemble.py "${places[@]}" --recipes "$recipes"
fi
run "$PYTHON" 08_report.py "${places[@]}"
