#!/usr/bin/env bash
# The core of the tests beside other versions of what the package is built on, in an environment of its own:
#   check.sh transformer-lens-4   the newest, which sae-lens cannot be installed beside
#   check.sh lowest               the lowest that pyproject.toml declares
set -euo pipefail
cd "$(dirname "$0")/../.."
which=$1
venv=.venv-$which
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)

"${PYTHON:-python3}" -m venv "$venv"
case $which in
  transformer-lens-4)
    grep -v '^transformer-lens==' constraints.txt > "$venv/constraints.txt"
    wanted=("transformer-lens>=4")
    ;;
  lowest)
    "$venv/bin/python" tests/versions/lowest.py > "$venv/constraints.txt"
    wanted=()
    ;;
  *)
    echo "transformer-lens-4 or lowest must be given, but got '$which'" >&2
    exit 2
    ;;
esac
# half of what pip takes is compiling modules of which the tests import few
"${pip[@]}" install --no-compile -c "$venv/constraints.txt" torch
"${pip[@]}" install --no-compile -c "$venv/constraints.txt" "${wanted[@]}" -e . beartype hypothesis pytest pytest-xdist
"$venv/bin/python" -m pip --disable-pip-version-check freeze | grep -i '^\(torch\|transformer\|optuna\|numpy\)'

# those that take longest first, so that both processes end together
core=(moves executors generation slots search hooks tuning activations decoding deltas identity lean models perplexity plan_files plans prompts steps)
files=("${core[@]/#/tests/test_}")
files=("${files[@]/%/.py}")
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${files[@]}"
