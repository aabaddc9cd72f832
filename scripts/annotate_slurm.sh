#!/usr/bin/env bash
# Score DiffusionDB on a SLURM cluster, a process a GPU: sbatch --nodes 4 scripts/annotate_slurm.sh [more options]
# Interrupted or out of time, the same command goes on, with any number of nodes; --meta_file lies on a disk they share.
#SBATCH --job-name annotate
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 12
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output annotate-%j.log
set -euo pipefail

hpc="${hpc:-hpc.pth}"
source_dataset="${source_dataset:-large_all}" # 14 million images, 6.5 TB that come and go part by part
meta_file="${meta_file:-diffusiondb_hps.jsonl}"
precision="${precision:-fp16}"          # fp32 is the reference, and several times slower
batch_size=128
prefetch_parts=2                        # a process: about 0.5 GB each, on the disk of --meta_file

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-12}" # srun does not take it over from sbatch
# A process takes its rank and its GPU from SLURM's variables. One that dies leaves the others at work.
srun --kill-on-bad-exit=0 python process_diffusiondb.py \
    --clip_checkpoint "$hpc" \
    --source_dataset "$source_dataset" \
    --meta_file "$meta_file" \
    --precision "$precision" \
    --batch_size "$batch_size" \
    --num_workers "$((${SLURM_CPUS_PER_TASK:-12} - 1))" \
    --prefetch_parts "$prefetch_parts" \
    "$@"
