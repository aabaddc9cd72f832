#!/usr/bin/env bash
# The whole pipeline on the toy world, on a CPU, in minutes: from human choices to a Stable Diffusion that people like better.
#
#   bash scripts/demo.sh [--seed N] [--output DIR] [--ablations]
#
# Every stage runs as a user would type it. Interrupted, the same command goes on where it stopped; finished, it prints its table.
# Writes DIR (demo by default): world/ (the inputs), every stage's outputs, summary.json, picture.png, report.html,
# report/index.html (every pair).
set -euo pipefail
cd "$(dirname "$0")/.."

seed=0 out=demo ablations=
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) seed="$2"; shift 2 ;;
        --output) out="${2%/}"; shift 2 ;;
        --ablations) ablations=yes; shift ;;
        *) echo "usage: bash scripts/demo.sh [--seed N] [--output DIR] [--ablations]" >&2; exit 2 ;;
    esac
done
. scripts/environment.sh
install requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing here needs the network

mkdir -p "$out"
stage() { # stage NAME COMMAND...: run it, and write down how long it took
    local name="$1" start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf '%s\t%s\n' "$name" "$((SECONDS - start))" >> "$out/seconds.tsv"
}
sd="toy/models/stable-diffusion"

# The toy world: pictures and choices of its people, DiffusionDB's parts, a web to download from.
[ -s "$out/port" ] || python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])' > "$out/port"
port="$(cat "$out/port")"
stage world python -m toy.make_data --output "$out/world" --seed "$seed" --url "http://127.0.0.1:$port"

# 1. Regularization images, over real HTTP.
python -m http.server "$port" --bind 127.0.0.1 --directory "$out/world/web" > "$out/server.log" 2>&1 &
trap 'kill $! 2> /dev/null || true' EXIT
sleep 1
stage download python download_regularization_images.py --urls "$out/world/urls.jsonl" \
    --output_folder "$out/regularization_images" --min_size 32 --image_size 32 --allow_private

# 2. The Human Preference Classifier.
stage train_hpc python train_hpc.py --dataset_folder "$out/world/dataset" --output "$out/hpc.pth" \
    --model toy/models/clip.json --pretrained toy/models/clip.safetensors \
    --unlocked_image_layers 4 --unlocked_text_layers 2 --learning_rate 1e-3 --warmup_steps 50 \
    --num_train_epochs 4 --random_flip --num_workers 1 --cpu --seed "$seed"
stage evaluate_preference python evaluate_preference.py --hpc "$out/hpc.pth" --dataset_folder "$out/world/dataset" \
    --model toy/models/clip.json --pretrained toy/models/clip.safetensors --output "$out/preference.jsonl" \
    --num_workers 0 --device cpu

# 3. The Human Preference Score of DiffusionDB's images.
stage annotate python process_diffusiondb.py --clip_checkpoint "$out/hpc.pth" \
    --source_dataset "$out/world/diffusiondb" --meta_file "$out/diffusiondb_hps.jsonl" --num_workers 1 --device cpu

# 4. The clearly best and the clearly worst image of each prompt.
stage select python select_training_images.py --meta_file "$out/diffusiondb_hps.jsonl" \
    --positive_folder "$out/positive" --negative_folder "$out/negative" --output_meta "$out/annotation.jsonl"

# 5. The LoRA. `--bare_prefix_prob` is ours, see the README; everything else is the paper's way.
train() { # train NAME OPTIONS...
    local name="$1"
    shift
    stage "train_$name" python train_lora.py --pretrained_model_name_or_path "$sd" --output_dir "$out/$name" \
        --regularization_annotation "$out/regularization_images.jsonl" --resolution 32 --train_batch_size 40 \
        --lora_rank 16 --learning_rate 5e-4 --max_train_steps 400 --checkpointing_steps 100 \
        --validation_prompt_file "$out/world/validation_prompts.txt" --validation_iters 200 --num_validation_images 3 \
        --validation_inference_steps 20 --validation_guidance_scale 2 --dataloader_num_workers 1 --cpu --seed "$seed" "$@"
}
train lora --annotation_file "$out/annotation.jsonl" --bare_prefix_prob 0.5

# 6 and 7. Pictures of prompts that no stage has seen, without and with the negative prompt, and their scores.
judge() { # judge NAME [LORA]
    local name="$1" lora="${2:-}" row negative
    for row in "$name" "${name}_negative"; do
        negative=""
        [ "$row" = "$name" ] || negative="Weird image. "
        stage "generate_$row" python generate_images.py --pretrained_model_name_or_path "$sd" --unet_weight "$lora" \
            --prompts "$out/world/prompts.json" --folder "$out/images/$row" --negative_prompt "$negative" \
            --num_inference_steps 20 --guidance_scale 2 --batch_size 48 --device cpu --quality 95
        stage "score_$row" python evaluate_hps.py --hpc "$out/hpc.pth" --image_folder "$out/images/$row" \
            --meta_file "$out/images/$row/meta.json" --output "$out/images/$row.jsonl" --num_workers 0 --device cpu --batch_size 64
    done
}
judge base
judge adapted "$out/lora"

if [ -n "$ablations" ]; then
    grep '"type": "positive"' "$out/annotation.jsonl" > "$out/annotation_positives.jsonl"
    train lora_regularization_only
    train lora_positives_only --annotation_file "$out/annotation_positives.jsonl"
    train lora_published --annotation_file "$out/annotation.jsonl"
    for name in regularization_only positives_only published; do
        judge "$name" "$out/lora_$name"
    done
fi

# Every pair side by side, base beside adapted.
stage compare python compare_models.py --baseline "$out/images/base" --candidate "$out/images/adapted_negative" \
    --labels base adapted --scores "$out/images/base.jsonl" "$out/images/adapted_negative.jsonl" --score_names HPS \
    --output "$out/report"

# What the toy world's people say.
printf '\n'
python -m toy.judge --output "$out" --seed "$seed"
