#!/usr/bin/env bash
# Train the LoRA with the paper's recipe on all GPUs of this machine: bash scripts/train_lora.sh [more options of train_lora.py]
# Interrupted, the same command goes on from the latest checkpoint.
set -euo pipefail

work_dir="${work_dir:-logs}"            # where the LoRA, checkpoints and validation pictures go
model="${model:-CompVis/stable-diffusion-v1-4}"
annotation="${annotation:-annotation.jsonl}"
regularization="${regularization:-regularization_images.jsonl}"
validation_prompts="${validation_prompts:-validation_prompts.txt}" # a prompt a line; left out if there is no such file
global_batch=40                         # pictures a step, over all processes
steps=10000
learning_rate=1e-5
lora_rank=4                             # as the released script; the paper's text is said to use 32
resolution=512
seed=42

# The batch is shared out evenly: 8 processes take 5 pictures each.
gpus="$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)"
processes="${processes:-$((gpus > 0 ? gpus : 1))}"
if [ $((global_batch % processes)) -ne 0 ]; then
    echo "error: a global batch of $global_batch cannot be shared out evenly among $processes processes" >&2
    exit 2
fi

cd "$(dirname "$0")/.."
if [ "$gpus" -gt 0 ]; then
    launch=(accelerate launch --num_processes "$processes" --num_machines 1 --mixed_precision "${mixed_precision:-fp16}" --dynamo_backend no)
    [ "$processes" -eq 1 ] || launch+=(--multi_gpu)
else # on CPUs accelerate launch starts one process only
    launch=(torchrun --standalone --nproc_per_node "$processes")
fi
validation=()
[ -f "$validation_prompts" ] && validation=(--validation_prompt_file "$validation_prompts")

"${launch[@]}" train_lora.py \
    --pretrained_model_name_or_path "$model" \
    --annotation_file "$annotation" \
    --regularization_annotation "$regularization" \
    --resolution "$resolution" \
    --train_batch_size $((global_batch / processes)) \
    --max_train_steps "$steps" \
    --checkpointing_steps 1000 \
    --learning_rate "$learning_rate" \
    --lr_scheduler constant \
    --lr_warmup_steps 0 \
    --lora_rank "$lora_rank" \
    --seed "$seed" \
    --output_dir "$work_dir" \
    "${validation[@]}" \
    --validation_iters 1000 \
    --report_to tensorboard \
    --resume_from_checkpoint latest \
    --dataloader_num_workers 4 \
    "$@"
