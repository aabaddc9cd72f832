"""A page to play with: the original Stable Diffusion beside the adapted one, from the same noise.

    pip install -r gradio_requirements.txt
    python app_gradio.py --unet_weight logs --hpc hpc.pth          # then open http://127.0.0.1:7860
    bash scripts/app_toy.sh                                        # the toy world's models

Reads   --unet_weight: the LoRA (none: the two sides differ by the negative prompt alone)
        --hpc: the classifier, for the Human Preference Score under each picture
        --examples: a JSON array, JSON Lines or text file of prompts

A seed's picture is the one that generate_images.py draws for it, bit for bit on the CPU. Without a seed it follows from the
prompt. One pipeline is in memory; the LoRA's weights are switched in it. There is no safety checker.
"""

import argparse
import contextlib
import copy
import hashlib
import os
import threading
from typing import NamedTuple

from utils import pipeline, prompts, ranks
from utils.errors import UserError, one_line_errors

MAX_PROMPT = 1000  # characters
MAX_STEPS = 150
MAX_SEED = 2**63 - 1
KEPT = 48  # pictures in a visitor's gallery
EXAMPLES = [
    "a portrait of a young woman holding a cup of coffee with both hands",
    "a knight in shining armour riding a white horse, oil painting",
    "two children playing chess in a park, studio photo",
    "a corgi on a skateboard, watercolor",
    "an astronaut waving at the viewer, highly detailed",
]
CSS = """
.gradio-container { max-width: 68rem !important; margin: 0 auto !important; }
#title h1 { letter-spacing: -.02em; margin-bottom: .1em; }
#title p { opacity: .75; }
.side { text-align: center; }
.picture { height: auto !important; min-height: 0 !important; aspect-ratio: 1; }
.picture * { min-height: 0 !important; }
#gallery, #gallery .grid-wrap { min-height: 0 !important; height: auto !important; }
#gallery .grid-container { padding-top: 2rem; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)) !important; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.hps { text-align: center; font-variant-numeric: tabular-nums; min-height: 1.6em; }
"""
SMALL = ".picture img, #gallery img { image-rendering: pixelated; }"  # pictures of a few pixels are shown as such


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Model.
    parser.add_argument(
        "--pretrained_model_name_or_path", default="CompVis/stable-diffusion-v1-4", help="the base model"
    )
    parser.add_argument("--unet_weight", default="", help="the LoRA, as generate_images.py takes it")
    parser.add_argument("--hpc", help="the classifier's checkpoint")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    # What the page shows at first.
    parser.add_argument("--negative_prompt", default="Weird image. ", help="where the negative prompt is on")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--examples", help="file of prompts to click on")
    # The server.
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers")
    parser.add_argument("--queue", type=int, default=20, help="so many may wait, others are sent away (default: 20)")
    return parser.parse_args(argv)


def main(args):
    start(args)


def start(args, wait: bool = True):
    """Serve the page until Ctrl-C, or return it and its painter at once."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    examples = prompts.read(args.examples)[:8] if args.examples else EXAMPLES
    painter = Painter(args)
    page = build_page(args, painter, examples).queue(max_size=args.queue, default_concurrency_limit=1)
    served = {"server_name": args.host, "server_port": args.port, "share": args.share, "prevent_thread_lock": not wait}
    try:
        page.launch(**served, **look(painter.side))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port}: {error}") from None
    return page, painter


# --- the pictures ---


class Request(NamedTuple):
    """What a visitor asks for, as the page sends it; `faults` says whether it can be drawn."""

    prompt: str
    steps: float | None
    guidance: float | None
    seed: str  # empty: from the prompt
    width: float | None
    height: float | None
    negative: str
    negative_base: bool
    negative_adapted: bool
    strength: float | None


class Painter:
    """The pipeline, the LoRA and the classifier; one picture is drawn at a time."""

    def __init__(self, args):
        from utils import lora

        self.lora = lora.read(args.unet_weight) if args.unet_weight else {}
        self.pipe = pipeline.load(args.pretrained_model_name_or_path)
        # In fp32, as the LoRA is added before the weights are rounded.
        self.modules = lora.places(self.pipe.unet, self.lora)
        self.weights = {name: copy.deepcopy(self.pipe.unet.get_submodule(name)) for name in self.modules}
        pipeline.place(self.pipe, args.device, args.precision)
        self.side = pipeline.side(self.pipe)
        self.scorer, self.lock = None, threading.Lock()
        if args.hpc:
            from utils import hps

            self.scorer = hps.load(args.hpc, device=ranks.device(args.device))

    def draw(self, request: Request, progress) -> tuple[list, list[float], int]:
        """Return the base's and the adapted model's picture, their scores (if there is a classifier) and the seed.

        `progress` is called with the share that is done. Raises ValueError saying why it cannot be drawn.
        """
        from utils import sampling

        if wrong := faults(request, self.side):
            raise ValueError(" ".join(wrong.values()))
        seed = int(request.seed) if request.seed.strip() else seed_of(request.prompt)
        steps, guidance = int(request.steps), float(request.guidance)
        height, width = int(request.height), int(request.width)
        done, images = 0, []

        def step(*_):
            nonlocal done
            done += 1
            progress(min(1.0, done / (2 * steps + 2)))

        with self.lock, counted(self.pipe.unet, step):
            for scale, with_negative in ((0.0, request.negative_base), (request.strength, request.negative_adapted)):
                self.switch(scale)
                negative = sampling.encode(self.pipe, [request.negative if with_negative else ""])
                drawn = sampling.draw(self.pipe, [request.prompt], [seed], negative, steps, guidance, height, width)
                images += sampling.to_images(drawn)
            scores = self.scorer.score(images, request.prompt).tolist() if self.scorer else []
        return images, scores, seed

    def switch(self, scale: float):
        """Give the UNet the weights that it has with the LoRA at this strength; 0 is the base model."""
        import torch

        from utils import lora

        flat = torch.nn.ModuleDict({name.replace(".", "_"): module for name, module in self.weights.items()})
        if scale:
            flat = copy.deepcopy(flat)
            lora.fuse(flat, self.lora, scale)
        with torch.no_grad():
            for name in self.modules:
                self.pipe.unet.get_submodule(name).weight.copy_(flat[name.replace(".", "_")].weight)


@contextlib.contextmanager
def counted(module, step):
    """Call `step` whenever the module is called."""
    hook = module.register_forward_pre_hook(step)
    try:
        yield
    finally:
        hook.remove()


def seed_of(prompt: str) -> int:
    """Return the seed that a prompt has when none is given."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def faults(request: Request, side: int) -> dict[str, str]:
    """Return {field: what is wrong with it, in words for the page}; `side` is the model's own, in pixels."""
    wrong = {}
    if not request.prompt.strip():
        wrong["prompt"] = "Type a prompt first."
    for field in ("prompt", "negative"):
        if len(text := getattr(request, field)) > MAX_PROMPT:
            wrong[field] = f"That is {len(text)} characters; at most {MAX_PROMPT} are taken."
    for field, low, high in (
        ("steps", 1, MAX_STEPS), ("guidance", 0, 30), ("strength", 0, 2), ("width", side // 4, 2 * side),
        ("height", side // 4, 2 * side),
    ):  # fmt: skip
        value = getattr(request, field)
        if value is None or not low <= value <= high:
            wrong[field] = f"{field.capitalize()} should be {low} to {high}."
        elif field in ("width", "height") and value % 8:
            wrong[field] = f"{field.capitalize()} should be a multiple of 8 pixels."
        elif field == "steps" and value != int(value):
            wrong[field] = "Steps should be a whole number."
    seed = request.seed.strip()
    if seed and not (seed.isascii() and seed.isdigit() and len(seed) < 20 and int(seed) <= MAX_SEED):
        wrong["seed"] = "A seed is a whole number from 0, below 2^63; leave it empty for one from the prompt."
    return wrong


# --- the page ---


def look(side: int) -> dict:
    """Return what the page is launched with: fonts and colours that need no network."""
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="cyan", neutral_hue="stone", **fonts).set(
        button_primary_background_fill="#0b7285",
        button_primary_background_fill_dark="#0b7285",
        button_primary_background_fill_hover="#095c6b",
        button_primary_background_fill_hover_dark="#0e8ba1",
        button_primary_text_color="white",
    )
    css = CSS + (SMALL if side < 128 else "")
    return {"theme": theme, "css": css, "footer_links": [], "ssr_mode": False, "show_error": True}


def build_page(args, painter: Painter, examples: list[str]):
    import gradio as gr

    def request_of(values) -> Request:
        # What an empty field sends is None.
        texts = ("prompt", "seed", "negative")
        return Request(*(v or "" if name in texts else v for name, v in zip(Request._fields, values, strict=True)))

    def validate(*values):
        wrong = faults(request_of(values[:-1]), painter.side)
        return [gr.validate(name not in wrong, wrong.get(name, "")) for name in (*Request._fields, "made")]

    def generate(*values, progress=gr.Progress()):  # noqa: B008  gradio finds it by its default
        """Draw a prompt with both models; return both pictures, what is said under them, and the visitor's gallery twice."""
        *values, made = values
        request = request_of(values)
        try:
            images, scores, seed = painter.draw(request, progress)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        notes = [f"seed {seed}"] * 2
        if scores:
            notes = [f"**HPS {scores[0]:.2f}**", f"**HPS {scores[1]:.2f}** ({scores[1] - scores[0]:+.2f})"]
            notes = [f"{note} · seed {seed}" for note in notes]
        captions = [f"{name}: {request.prompt}" for name in ("original", "adapted")]
        made = [*zip(images, captions, strict=True), *made][:KEPT]
        return *images, *notes, made, made

    with gr.Blocks(
        title="Better aligned Stable Diffusion", analytics_enabled=False, delete_cache=(3600, 24 * 3600)
    ) as page:
        said = "The same prompt from the same noise: Stable Diffusion as it is, and adapted to what people prefer."
        if not args.unet_weight:
            said += " *No LoRA is loaded: the right side differs by its negative prompt alone.*"
        gr.Markdown(f"# Better aligned Stable Diffusion\n{said}", elem_id="title")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                show_label=False, placeholder="What should be in the picture?", lines=1, max_lines=4, scale=5, min_width=300,
                autofocus=True, elem_id="prompt",
            )  # fmt: skip
            button = gr.Button("Generate", variant="primary", scale=1, min_width=120, elem_id="generate")
        pictures, notes = [], []
        with gr.Row():
            for name, label in (("original", "Original Stable Diffusion"), ("adapted", "Adapted")):
                with gr.Column(min_width=140):
                    gr.Markdown(f"### {label}", elem_classes="side")
                    picture = gr.Image(
                        label=label, show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"],
                        elem_id=name, elem_classes="picture", placeholder=" ",
                    )  # fmt: skip
                    pictures.append(picture)
                    notes.append(gr.Markdown("", elem_classes="hps", elem_id=f"{name}-note"))
        gr.Examples(examples, prompt, label="Examples", elem_id="examples")
        with gr.Group(elem_id="options"):  # open, so that what is wrong with a field is seen
            with gr.Row():
                steps = gr.Number(args.num_inference_steps, label="Steps", precision=0, min_width=120, elem_id="steps")
                guidance = gr.Number(args.guidance_scale, label="Guidance", min_width=120, elem_id="guidance")
                seed = gr.Textbox("", label="Seed", placeholder="from the prompt", min_width=120, elem_id="seed")
                width = gr.Number(painter.side, label="Width", precision=0, min_width=120, elem_id="width")
                height = gr.Number(painter.side, label="Height", precision=0, min_width=120, elem_id="height")
            with gr.Row():
                negative = gr.Textbox(args.negative_prompt, label="Negative prompt", max_lines=2, elem_id="negative")
                with gr.Column():
                    base_negative = gr.Checkbox(False, label="negative prompt for the original")
                    adapted_negative = gr.Checkbox(True, label="negative prompt for the adapted")
                strength = gr.Slider(
                    0, 2, 1, step=0.05, label="Strength of the LoRA", interactive=bool(args.unet_weight)
                )
        made = gr.State([], time_to_live=24 * 3600)
        gallery = gr.Gallery(
            label="Made so far",
            columns=6,
            format="png",
            object_fit="contain",
            fit_columns=False,
            height="auto",
            elem_id="gallery",
        )
        options = (steps, guidance, seed, width, height, negative, base_negative, adapted_negative, strength)
        gr.on(
            [prompt.submit, button.click],
            generate,
            [prompt, *options, made],
            [*pictures, *notes, made, gallery],
            api_name="generate",
            concurrency_limit=1,
            show_progress_on=pictures,
            validator=validate,
        )
    return page


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
