#!/usr/bin/env bash
# Generate pictures with the paper's settings on all GPUs of this machine: bash scripts/generate_images.sh [more options]
# Interrupted, the same command goes on where it stopped.
set -euo pipefail

unet_weight="${unet_weight-logs}"       # the LoRA: a file or the folder that holds it; empty for the base model
prompts="${prompts:-prompt_list.json}"
folder="${folder:-output}"
model="${model:-CompVis/stable-diffusion-v1-4}"
batch_size=16                           # a process; halved by itself where memory runs out
steps=50
guidance_scale=7.5
seed=0

cd "$(dirname "$0")/.."
gpus="$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)"
[ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
processes="${processes:-$((gpus > 0 ? gpus : 1))}"
torchrun --standalone --nproc_per_node "$processes" generate_images.py \
    --pretrained_model_name_or_path "$model" \
    --unet_weight "$unet_weight" \
    --prompts "$prompts" \
    --folder "$folder" \
    --batch_size "$batch_size" \
    --num_inference_steps "$steps" \
    --guidance_scale "$guidance_scale" \
    --seed "$seed" \
    "$@"
