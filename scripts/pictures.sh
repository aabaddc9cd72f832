#!/usr/bin/env bash
# Make the README's pictures anew, from the demo's models and pictures: bash scripts/pictures.sh [the demo's folder]
# Writes assets/{demo,figure,report,report_phone,app}.png. Needs what scripts/test.sh installs.
set -euo pipefail
cd "$(dirname "$0")/.."
demo="${1:-demo}"
. scripts/environment.sh
install test_requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing here needs the network
if [ "$demo" = demo ] && [ ! -s demo/summary.json ]; then
    bash scripts/demo.sh
fi

work="$(mktemp -d)"
trap 'kill "${app:-}" 2> /dev/null || true; rm -r "$work"' EXIT

# The demo's picture, the figure.
cp "$demo/picture.png" assets/demo.png
python compare_models.py --baseline "$demo/images/base" --candidate "$demo/images/adapted_negative" --labels base adapted \
    --scores "$demo/images/base.jsonl" "$demo/images/adapted_negative.jsonl" --score_names HPS --output "$work/report"
cp "$work/report/figure.png" assets/figure.png

# The pages, in a browser.
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
python app_gradio.py --pretrained_model_name_or_path toy/models/stable-diffusion --unet_weight "$demo/lora" --hpc "$demo/hpc.pth" \
    --num_inference_steps 20 --guidance_scale 2 --examples "$demo/world/validation_prompts.txt" --device cpu --port "$port" &
app=$!
PYTHONPATH=tests python - "$work/report/index.html" "http://127.0.0.1:$port" << 'END'
import sys
import time
import urllib.request

from browser import open_page
from PIL import Image

report, app = sys.argv[1:]


def take(page, path):
    page.wait_for_timeout(1000)
    page.screenshot(path=path)
    # 256 colours are enough for the README.
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


with open_page(1280, 1240) as page:
    page.goto(f"file://{report}")
    take(page, "assets/report.png")
with open_page(390, 844, dark=True) as page:
    page.goto(f"file://{report}")
    page.locator("#grid").scroll_into_view_if_needed()
    page.mouse.wheel(0, 300)
    take(page, "assets/report_phone.png")
for _ in range(120):
    try:
        urllib.request.urlopen(app)
        break
    except OSError:
        time.sleep(1)
with open_page(1280, 1300) as page:
    page.goto(app)
    for example in (0, 1, 3, 2):
        page.locator("#examples button").nth(example).click()
        page.wait_for_timeout(500)
        page.click("#generate")
        page.wait_for_timeout(4000)
    take(page, "assets/app.png")
END
ls -l assets
