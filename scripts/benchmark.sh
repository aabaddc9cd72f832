#!/usr/bin/env bash
# Measure every speed that the README states, on this machine: bash scripts/benchmark.sh [name ...]
# Writes benchmarks/results/*.json and prints the README's table. Runs in the active Python environment, without the network.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ $# -eq 0 ]; then # each file there with a command line is a benchmark
    for file in $(grep -l '__main__' benchmarks/*.py); do
        [ "$file" = benchmarks/tables.py ] || set -- "$@" "$(basename "$file" .py)"
    done
fi
failed=()
for name in "$@"; do
    printf '\n== %s\n' "$name"
    python -m "benchmarks.$name" || failed+=("$name")
done
python -m benchmarks.tables
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
