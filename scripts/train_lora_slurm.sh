#!/usr/bin/env bash
# Train the LoRA on several machines of a SLURM cluster: sbatch scripts/train_lora_slurm.sh [more options of train_lora.py]
# Submitted again after a time limit, it goes on from the latest checkpoint.
#SBATCH --job-name=align_sd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail

# . .venv/bin/activate                  # what makes `torchrun` available on the nodes
cd "${SLURM_SUBMIT_DIR:-.}"

machines="$SLURM_JOB_NUM_NODES"
main_address="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # head would hang up on scontrol, which pipefail takes for a failure
main_port="$((20000 + SLURM_JOB_ID % 20000))"
export machines main_address main_port
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-32}" # srun does not take it over from sbatch
export SLURM_KILL_BAD_EXIT=1                           # one machine alone would wait for the others

# One task a machine; torchrun starts its processes, one a GPU. 2 x 4 of them take 5 pictures each of the paper's 40.
srun bash -c 'machine_rank="$SLURM_PROCID" bash scripts/train_lora.sh "$@"' train_lora "$@"
