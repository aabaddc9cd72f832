#!/usr/bin/env bash
# Train the LoRA with the paper's recipe on all GPUs of this machine: bash scripts/train_lora.sh [more options of train_lora.py]
# Interrupted, the same command goes on from the latest checkpoint, also when the batch is shared out otherwise by then.
#
# On several machines run the same command on each, with where the first one is and which one this is:
#   machines=2 machine_rank=0 main_address=node1 bash scripts/train_lora.sh      (scripts/train_lora_slurm.sh does so with SLURM)
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

machines="${machines:-1}"               # all of them see the same work_dir and data
machine_rank="${machine_rank:-0}"
main_address="${main_address:-127.0.0.1}"
main_port="${main_port:-29500}"
gpus="$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)"
[ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
processes="${processes:-$((gpus > 0 ? gpus : 1))}"                 # of this machine: one a GPU
mixed_precision="${mixed_precision:-$([ "$gpus" -gt 0 ] && echo fp16 || echo no)}"

# The batch is shared out evenly: 8 processes take 5 pictures each.
if [ $((global_batch % (processes * machines))) -ne 0 ]; then
    echo "error: a global batch of $global_batch cannot be shared out evenly among $((processes * machines)) processes" >&2
    exit 2
fi

cd "$(dirname "$0")/.."
launch=(torchrun --nproc_per_node "$processes")
if [ "$machines" -eq 1 ]; then
    launch+=(--standalone)
else
    launch+=(--nnodes "$machines" --node_rank "$machine_rank" --master_addr "$main_address" --master_port "$main_port")
fi
validation=()
[ -f "$validation_prompts" ] && validation=(--validation_prompt_file "$validation_prompts")

"${launch[@]}" train_lora.py \
    --pretrained_model_name_or_path "$model" \
    --annotation_file "$annotation" \
    --regularization_annotation "$regularization" \
    --resolution "$resolution" \
    --train_batch_size $((global_batch / processes / machines)) \
    --mixed_precision "$mixed_precision" \
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
