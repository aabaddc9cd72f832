#!/usr/bin/env bash
# The page of app_gradio.py with the toy world's models: bash scripts/app_toy.sh [more options of app_gradio.py]
# They are the demo's; where there is no demo yet, it is made first (minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install gradio_requirements.txt

if [ ! -s demo/summary.json ]; then
    echo "There is no demo/ yet. Making it first: bash scripts/demo.sh"
    bash scripts/demo.sh
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing here needs the network
exec python app_gradio.py --pretrained_model_name_or_path toy/models/stable-diffusion --unet_weight demo/lora --hpc demo/hpc.pth \
    --num_inference_steps 20 --guidance_scale 2 --examples demo/world/validation_prompts.txt --device cpu "$@"
