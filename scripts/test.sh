#!/usr/bin/env bash
# Lint and test everything on a fresh Linux machine with Python: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install test_requirements.txt

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing here needs the network
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"        # the models are tiny: threads would only wait for each other
ruff check .
ruff format --check .
python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
