#!/usr/bin/env bash
# Lint and test everything on a fresh Linux machine with Python: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install test_requirements.txt

# The pages are tested in a real browser: Debian's Chromium, or else the one that Playwright downloads.
if ! command -v chromium > /dev/null && [ -z "$(ls -d ~/.cache/ms-playwright/chromium* 2> /dev/null)" ]; then
    sudo="$([ "$(id -u)" = 0 ] || echo sudo)"
    { $sudo apt-get update -qq && $sudo apt-get install -qq --no-install-recommends chromium > /dev/null; } ||
        python -m playwright install --with-deps chromium
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing here needs the network
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"        # the models are tiny: threads would only wait for each other
ruff check .
ruff format --check .
python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
