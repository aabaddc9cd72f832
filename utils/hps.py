"""The Human Preference Score (HPS): the one place that turns a picture and its prompt into a score.

    HPS(image, prompt) = 100 * cos(E_image(image), E_text(prompt))        (paper, section 4)

E_image and E_text are the two towers of CLIP, fine-tuned on human choices. The cosine (around 0.2) has no unit;
`evaluate_hps.py` prints its mean as it is, everything that is stored holds it times 100, as here. In fp32 it equals the
formula in the original README, run with OpenAI's CLIP, to 1e-5 of the cosine.

    from utils import hps
    scorer = hps.load("hpc.pth", device="cuda")
    scorer.score(["a.png", "b.png"], "a red circle")        # float32 array of shape (2,)

A checkpoint that is no checkpoint, or is one of another model, raises UserError, in one line; so does a picture that
cannot be decoded.
"""

import difflib
import hashlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torchvision.transforms import Compose

from utils.errors import UserError
from utils.images import eight_bit, open_image

DEFAULT_MODEL = "ViT-L-14-quickgelu"  # OpenAI's ViT-L/14; open_clip's plain "ViT-L-14" has another activation
DTYPES = {"fp32": None, "fp16": torch.float16}  # with the few digits of bf16 full-size scores move by 0.12
RESIZES = ("crop", "pad")
JIT_EXTRAS = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
)  # in OpenAI's archives, beside the weights


@dataclass
class HPS:
    """A loaded classifier; `load` makes it."""

    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]  # any picture -> float32 (3, h, w)
    tokenizer: Callable[[list[str]], torch.Tensor]  # n prompts -> int64 (n, 77), cut to 77 tokens with the end kept
    device: torch.device
    name: str  # open_clip's name of the model
    config: str | dict  # what a checkpoint says under "model": that name, or the JSON config itself
    resize: str  # "crop" or "pad"; a checkpoint says so under "resize"
    precision: str  # "fp32" or "fp16"

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode preprocessed pictures, float (n, 3, h, w), into unit vectors, float32 (n, d) on the device."""
        with no_tf32(), self._autocast():
            features = self.model.encode_image(pixels.to(self.device, non_blocking=True))
        return F.normalize(features.float(), dim=-1)

    @torch.inference_mode()
    def encode_prompts(self, prompts: list[str], batch_size: int = 256) -> torch.Tensor:
        """Encode n >= 1 prompts into unit vectors, float32 (n, d) on the device."""
        features = []
        for start in range(0, len(prompts), batch_size):
            with self._autocast():
                tokens = self.tokenizer(prompts[start : start + batch_size]).to(self.device)
                features.append(self.model.encode_text(tokens).float())
        return F.normalize(torch.cat(features), dim=-1)

    def score(self, images: list, prompts: list[str] | str, batch_size: int = 16) -> np.ndarray:
        """Return the HPS of each image (a PIL image or a path) with its prompt, or with the one prompt: float32 (n,)."""
        if isinstance(images, (str, Path, Image.Image)):
            images = [images]
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        if not images:
            return np.zeros(0, np.float32)
        distinct = list(dict.fromkeys(prompts))
        encoded = dict(zip(distinct, self.encode_prompts(distinct), strict=True))
        scores = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            features = self.encode_images(torch.stack([self._pixels(image) for image in images[batch]]))
            scores.append(pair_scores(features, torch.stack([encoded[p] for p in prompts[batch]])))
        return torch.cat(scores).cpu().numpy()

    def _pixels(self, image) -> torch.Tensor:
        try:
            return self.preprocess(image if isinstance(image, Image.Image) else open_image(image))
        except ValueError as error:
            raise UserError(f"{image}: {error}") from None

    def _autocast(self):
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def no_tf32():
    """Let fp32 mean fp32 on a GPU too: by default cuDNN computes convolutions, here the patch embedding, in TF32."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def pair_scores(images: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Return 100 * cos of each image with its prompt, both encoded as unit vectors (n, d): float32 (n,)."""
    return 100 * (images * prompts).sum(-1)


def load(
    checkpoint: str | Path | None = None,
    model: str | dict | None = None,
    device: str | torch.device = "cpu",
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    resize: str | None = None,
) -> HPS:
    """Load a classifier from `checkpoint`, or plain CLIP from `pretrained` (an open_clip tag, or a file of weights).

    `checkpoint` is an hpc.pth or a .safetensors in the names of OpenAI's CLIP, which are open_clip's. `model` is an
    open_clip name, the path of a JSON config or the config itself; by default it is what the checkpoint says, else
    ViT-L/14. `resize` "crop" is CLIP's own preprocess; "pad" fits the longest side and pads with black, as the paper
    says and HPS v2 does. It too is what the checkpoint says unless given. Raises UserError if the checkpoint says
    otherwise than what is given, or holds other weights than the model has.
    """
    if checkpoint is None and pretrained is not None and Path(pretrained).is_file():
        checkpoint, pretrained = pretrained, None
    if (checkpoint is None) == (pretrained is None):
        raise UserError("give either a checkpoint or the tag of pretrained weights")
    state, saved = ({}, {}) if checkpoint is None else read_checkpoint(checkpoint)

    # What was trained with one model and one way to resize is not scored with another.
    says = saved.get("model")
    name, config = find_model(model or says or DEFAULT_MODEL)
    if says and open_clip.get_model_config(find_model(says)[0]) != open_clip.get_model_config(name):
        made_with = says if isinstance(says, str) else "a config of its own"
        raise UserError(f"{checkpoint}: made with the model {made_with}, not with {model}")
    says = saved.get("resize")
    if says and resize and says != resize:
        raise UserError(f"{checkpoint}: made with the pictures' resize {says!r}, not with {resize!r}")
    resize = resize or says or "crop"
    if resize not in RESIZES:
        raise UserError(f"resize should be one of {', '.join(RESIZES)}, not {resize!r}")

    clip, tokenizer = build(name, pretrained)
    if checkpoint is not None:
        fill(clip, state, checkpoint, name)
    device = torch.device(device)
    return HPS(
        clip.to(device).eval(), make_preprocess(clip, resize), tokenizer, device, name, config, resize, precision
    )


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return a checkpoint's weights in open_clip's names, on the CPU, and what else it says, such as "model"."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a TorchScript archive is one: that is an error in the next moment
            safe = Path(path).suffix == ".safetensors"
            saved = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for what it did not write
        held = re.search(r"Unsupported \w+: GLOBAL (\S+)|(TorchScript) archive", str(error))
        why = f"it holds {held[1] or held[2]}, not only tensors" if held else "of another kind, or cut short"
        raise UserError(f"{path}: not a checkpoint of tensors ({why})") from None
    wrapped = isinstance(saved, dict) and isinstance(saved.get("state_dict"), dict)
    state = saved["state_dict"] if wrapped else saved
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f'{path}: holds no weights, neither under "state_dict" nor bare')
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if key not in JIT_EXTRAS}, saved if wrapped else {}


def find_model(model: str | Path | dict) -> tuple[str, str | dict]:
    """Return open_clip's name for a model, and what a checkpoint is to say: the name, or the JSON config's content."""
    if isinstance(model, str) and model in open_clip.list_models():
        return model, model
    stem, config = "config", model
    if not isinstance(model, dict):
        stem = Path(str(model)).stem
        if not str(model).endswith(".json"):
            near = difflib.get_close_matches(str(model), open_clip.list_models())
            raise UserError(
                f"no open_clip model is called {model!r}" + (f"; near it are {', '.join(near)}" if near else "")
            )
        if not Path(model).is_file():
            raise UserError(f"{model}: no such file")
        try:
            config = json.loads(Path(model).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{model}: not valid JSON: {error}") from None
    missing = [
        key for key in ("embed_dim", "vision_cfg", "text_cfg") if not isinstance(config, dict) or key not in config
    ]
    if missing:
        raise UserError(f"{stem if model is config else model}: no open_clip config: {', '.join(missing)} missing")

    # open_clip knows a config by its file's name; with a name made of the content, none shadows another.
    content = json.dumps(config, sort_keys=True)
    name = f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if name in open_clip.list_models():
        return name, config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.json")
        path.write_text(content)
        open_clip.add_model_config(path)
    return name, config


def build(name: str, pretrained: str | None):
    """Return open_clip's model, its weights left unset unless `pretrained` names some, and its tokenizer."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip logs that the weights are random, and errors that it raises as well
    try:
        with Unset(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")  # the activation that the weights want
            return open_clip.create_model(name, pretrained), open_clip.get_tokenizer(name)
    except Exception as error:  # a config of impossible sizes, an unknown tag, a download that failed
        raise UserError(f"{name}: cannot be built: {str(error).splitlines()[0] or type(error).__name__}") from None
    finally:
        logging.disable(level)


class Unset(TorchFunctionMode):
    """Leave out random initialisation (7 s for ViT-L/14) where a checkpoint is about to replace every weight."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], path, name: str):
    """Load weights into a model, all of them; UserError counting and naming what does not fit."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    said = [
        f"{len(keys)} {fault} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for fault, keys in faults.items()
        if keys
    ]
    if said:
        raise UserError(f"{path}: not the weights of {name}: {'; '.join(said)}; is it another model's (--model)?")
    model.load_state_dict(state)


def make_preprocess(model: torch.nn.Module, resize: str) -> Compose:
    """Return open_clip's preprocess of a model, which for CLIP is OpenAI's bit for bit; it can be pickled."""
    config = PreprocessCfg(**model.visual.preprocess_cfg)
    if resize == "pad":
        config.resize_mode, config.fill_color = "longest", 0
    steps = image_transform_v2(config, is_train=False).transforms
    if resize == "pad":
        # Pad after the conversion to RGB, so that 0 is black in pictures of every mode.
        shrink, pad, to_rgb, *rest = steps
        steps = [shrink, to_rgb, pad, *rest]
    return Compose([eight_bit, partial(refuse_slivers, side=int(np.max(config.size))), *steps])


def refuse_slivers(image: Image.Image, side: int) -> Image.Image:
    """Return the picture; ValueError if it is so long and thin that resizing its short side to `side` would fill the memory."""
    short, long = sorted(image.size)
    if long * side * side > Image.MAX_IMAGE_PIXELS * short:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
    return image
