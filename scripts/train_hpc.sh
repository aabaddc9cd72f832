#!/usr/bin/env bash
# Train the classifier with the paper's recipe on the GPUs of this machine: bash scripts/train_hpc.sh [more options of train_hpc.py]
# Interrupted, the same command goes on from the last checkpoint.
set -euo pipefail

dataset="${dataset:-dataset}"           # preference_{train,test}.json and preference_images/
output="${output:-hpc.pth}"
model="${model:-ViT-L-14-quickgelu}"
pretrained="${pretrained:-openai}"
batch_size=5                            # prompts a step, shared out over all processes
epochs=1
learning_rate=1.7e-5
weight_decay=3.1e-3
image_layers=10                         # last blocks that train
text_layers=6
seed=42

# A process without a prompt of its own would only wait.
gpus="$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)"
[ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
processes="${processes:-$((gpus > batch_size ? batch_size : gpus > 0 ? gpus : 1))}"

cd "$(dirname "$0")/.."
if [ "$gpus" -gt 0 ]; then
    launch=(accelerate launch --num_processes "$processes" --num_machines 1 --mixed_precision "${mixed_precision:-bf16}" --dynamo_backend no)
    [ "$processes" -eq 1 ] || launch+=(--multi_gpu)
else # on CPUs accelerate launch starts one process only
    launch=(torchrun --standalone --nproc_per_node "$processes")
fi

"${launch[@]}" train_hpc.py \
    --dataset_folder "$dataset" \
    --output "$output" \
    --model "$model" \
    --pretrained "$pretrained" \
    --unlocked_image_layers "$image_layers" \
    --unlocked_text_layers "$text_layers" \
    --batch_size "$batch_size" \
    --num_train_epochs "$epochs" \
    --learning_rate "$learning_rate" \
    --weight_decay "$weight_decay" \
    --eval_steps 1000 \
    --seed "$seed" \
    --num_workers 4 \
    "$@"
