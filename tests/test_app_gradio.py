"""The demo page as visitors meet it, in a browser and through gradio's client; its pictures are the command line's."""

import json
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import open_page
from conftest import SD
from gradio_client import Client
from PIL import Image
from safetensors.torch import load_file
from test_lora import random_matrices, toy_unet, write

import app_gradio
import generate_images
from toy import make_data
from utils.errors import UserError

STEPS, GUIDANCE = 4, 2
EXAMPLES = ["a red circle on a white background", "a blue square on a black background, 4 k"]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The page with a random LoRA and the toy CLIP as classifier, served as `main` serves it but not waiting for Ctrl-C."""
    folder = tmp_path_factory.mktemp("app")
    write(folder / "lora.safetensors", random_matrices(toy_unet(), 4), "modern")
    clip = make_data.MODEL.parent / "clip.safetensors"
    weights = {key: value.float() for key, value in load_file(clip).items()}
    torch.save({"state_dict": weights, "model": json.loads(clip.with_suffix(".json").read_text())}, folder / "hpc.pth")
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--pretrained_model_name_or_path {SD} --unet_weight {folder}/lora.safetensors --hpc {folder}/hpc.pth --device cpu"
    args = app_gradio.parse_args(
        f"{words} --num_inference_steps {STEPS} --guidance_scale {GUIDANCE} --port {port} --queue 3 "
        f"--examples {folder}/examples.json".split()
    )
    # What gradio's server and client keep of every answer goes where pytest cleans up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "server"))
        patch.setattr(tempfile, "tempdir", str(folder))
        page, painter = app_gradio.start(args, wait=False)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, folder=folder, painter=painter, args=args)
        page.close()


def ask(app, prompt: str, seed="", steps=STEPS, size=32, strength=1.0, negative="Weird image. ", sides=(False, True)):
    """Ask for a prompt's pictures as one visitor; return the job."""
    client = Client(app.url, verbose=False, download_files=app.folder / "client")
    return client.submit(prompt, steps, GUIDANCE, seed, size, size, negative, *sides, strength, api_name="/generate")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def draw(app, folder, prompts, seed, *options) -> list[np.ndarray]:
    """Draw the prompts by the command line, prompt k from seed + k."""
    (app.folder / "prompts.json").write_text(json.dumps(prompts))
    words = f"--pretrained_model_name_or_path {SD} --prompts {app.folder}/prompts.json --folder {folder} --device cpu --format png"
    words += f" --num_inference_steps {STEPS} --guidance_scale {GUIDANCE} --seed {seed} --batch_size 1"
    generate_images.main(generate_images.parse_args([*words.split(), *map(str, options)]))
    return [pixels(folder / f"{i}.png") for i in range(len(prompts))]


def test_two_at_once_get_the_command_lines_pictures(app, tmp_path):
    prompts = ["a green circle on a white background", "a red square on a black background, oil painting"]
    strengths = ("1.0", "0.6")
    base = draw(app, tmp_path / "base", prompts, 41, "--negative_prompt", "")
    adapted = [
        draw(app, tmp_path / s, prompts, 41, "--unet_weight", app.folder / "lora.safetensors", "--lora_scale", s)[i]
        for i, s in enumerate(strengths)
    ]
    assert np.abs(base[0].astype(int) - adapted[0]).max() > 30  # so that equality says something

    def visit(i):
        return [ask(app, prompts[i], str(41 + i), strength=float(strengths[i])).result(timeout=60) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        visits = list(pool.map(visit, (0, 1)))
    for i, answers in enumerate(visits):
        for left, right, left_note, right_note, gallery in answers:
            assert np.array_equal(pixels(left), base[i])
            assert np.array_equal(pixels(right), adapted[i])
            # What stands under the pictures is their score.
            scores = app.painter.scorer.score([Image.open(left), Image.open(right)], prompts[i])
            assert left_note == f"**HPS {scores[0]:.2f}** · seed {41 + i}"
            assert right_note == f"**HPS {scores[1]:.2f}** ({scores[1] - scores[0]:+.2f}) · seed {41 + i}"
            assert [item["caption"] for item in gallery] == [f"original: {prompts[i]}", f"adapted: {prompts[i]}"]

    # The negative prompt belongs to the sides that it is on for.
    left, right, *_ = ask(app, prompts[0], "41", sides=(True, False), strength=0.0).result(timeout=60)
    assert np.array_equal(pixels(right), base[0]) and not np.array_equal(pixels(left), base[0])


def test_the_seed_follows_from_the_prompt_and_absurd_requests_are_refused(app):
    seeds = [ask(app, prompt).result(timeout=60)[2].split()[-1] for prompt in ("a", "a", "b")]
    assert seeds[0] == seeds[1] != seeds[2]
    for request, said in (
        (("x" * 1001,), "1001 characters; at most 1000"),
        ((" ",), "Type a prompt first"),
        (("x", "-1"), "A seed is a whole number"),
        (("x", str(2**63)), "A seed is a whole number"),
        (("x", "", 10_000), "Steps should be 1 to 150"),
        (("x", "", 0), "Steps should be 1 to 150"),
        (("x", "", STEPS, 4096), "Width should be 8 to 64"),
        (("x", "", STEPS, 36), "Height should be a multiple of 8"),
        (("x", "", STEPS, 32, 50), "400 Bad Request"),
        (("x", "", STEPS, 32, 1, "y" * 1001), "1001 characters"),
    ):
        with pytest.raises(Exception, match=said):
            ask(app, *request).result(timeout=60)
    nan = float("nan")
    wrong = app_gradio.faults(app_gradio.Request("x", nan, nan, "7.5", None, 32, "", False, True, 3), 32)
    assert wrong.keys() == {"steps", "guidance", "seed", "width", "strength"}


def test_a_full_queue_sends_visitors_away_with_a_message(app):
    with app.painter.lock:  # as if a picture took for ever
        jobs = [ask(app, f"prompt {i}") for i in range(6)]
        refused = []
        for job in jobs:
            try:
                job.exception(timeout=0.5)
            except TimeoutError:
                continue
            refused.append(job)
        assert 1 <= len(refused) < 6
        for job in refused:
            assert "queue is full" in str(job.exception()).lower()
    for job in jobs:
        if job not in refused:
            assert len(job.result(timeout=60)) == 5


def test_the_page_in_a_browser(app):
    with open_page() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(app.url)
        page.locator("#examples button").nth(1).click()
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(EXAMPLES[1])}")
        page.click("#generate")
        for side in ("original", "adapted"):
            page.wait_for_function(f"document.querySelector('#{side} img')?.naturalWidth === 32")
            assert "HPS" in page.inner_text(f"#{side}-note")
        assert page.locator("#gallery .grid-container img").count() == 2
        assert page.problems == []
        outside = [url for url in asked if not url.startswith((app.url, "data:", "blob:"))]
        assert outside == []

        # A bad value says so beside its field; mended, it is drawn.
        before = page.locator("#adapted img").get_attribute("src")
        page.fill("#steps input", "9999")
        page.click("#generate")
        page.get_by_text("Steps should be 1 to 150.").wait_for()
        page.fill("#steps input", "3")
        page.fill("#seed textarea, #seed input", "12")
        page.click("#generate")
        page.wait_for_function(f"document.querySelector('#adapted img')?.src !== {json.dumps(before)}")
        page.get_by_text("seed 12").nth(1).wait_for()
        page.wait_for_function("document.querySelectorAll('#gallery .grid-container img').length === 4")
    with open_page(390, 844, dark=True) as page:
        page.goto(app.url)
        page.fill("#prompt textarea", "a green square")
        page.keyboard.press("Enter")
        page.wait_for_selector("#adapted img")
        page.wait_for_selector("#gallery .grid-container img")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_mistakes_end_with_one_line(app, tmp_path):
    with pytest.raises(UserError, match=rf"--port {app.port}: "):
        app_gradio.start(app.args)
    for option, said in (("--unet_weight", "no such file"), ("--hpc", "no such file"), ("--examples", "no such file")):
        args = app_gradio.parse_args(
            ["--pretrained_model_name_or_path", SD, option, str(tmp_path / "none"), "--device", "cpu"]
        )
        with pytest.raises(UserError, match=said):
            app_gradio.start(args)
