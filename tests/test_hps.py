"""The score: at full size against transformers' CLIP, its preprocess against the formula, its checkpoints in every form."""

import gzip
import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from utils import hps
from utils.errors import UserError

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
PROMPTS = [
    "a red circle on a white background",
    "",
    "Portrait of a CAT,   oil painting by greg rutkowski, 8 k!!",
    "an owl 🦉🏽 and a dragon 🐉, café, 龍, ¡olé!",
    "very " * 200 + "long",
    " ".join(f"word{i}," for i in range(60)),
    "it's the dog's 3rd birthday; don't",
]


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights in OpenAI's names, in half precision, that carry a difference at the input through to the output."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in open_clip.CLIP(**config).state_dict().items()}
    rng, state = np.random.default_rng(seed), {}
    for key, shape in shapes.items():
        value = torch.from_numpy(rng.random(tuple(shape), np.float32)).reshape(shape) * 2 - 1
        if "ln_" in key and key.endswith("weight"):
            value = 1 + 0.2 * value
        elif value.ndim >= 2:
            value *= (3 / (shape[0] if key.endswith("proj") else shape[1:].numel())) ** 0.5
        else:
            value *= 0.2
        state[key] = value.half()
    return state


@cache
def pictures() -> dict[str, Image.Image]:
    """Return a smooth picture of each mode and several shapes; where there is alpha, it varies."""
    rng = np.random.default_rng(0)

    def noise(mode, size):
        image = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        return image if mode == "RGBA" else image.convert("RGB").convert(mode)

    grey16 = np.asarray(noise("L", (301, 260)), np.uint16) * 257 + rng.integers(0, 3, (260, 301)).astype(np.uint16)
    return {
        "RGB": noise("RGB", (311, 260)),
        "RGBA": noise("RGBA", (230, 395)),
        "L": noise("L", (224, 224)),
        "P": noise("RGB", (400, 301)).quantize(64),
        "LA": noise("RGBA", (260, 300)).convert("LA"),
        "CMYK": noise("CMYK", (100, 61)),
        "I;16": Image.fromarray(grey16),
    }


def clip_preprocess(image: Image.Image, size: int) -> np.ndarray:
    """CLIP's preprocess, written out: shortest side to `size`, bicubic; centre crop; RGB; normalise."""
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((np.asarray(image.convert("RGB")) / 255.0 - mean) / std).transpose(2, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """The token ids of PROMPTS by transformers' tokenizer, from the vocabulary that OpenAI published."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = [tuple(line.split()) for line in gzip.open(path, "rt", encoding="utf-8").read().split("\n")[1:48895]]
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {special.get(token, token): i for token, i in open_clip.SimpleTokenizer().encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    return tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_scores_of_full_size_equal_an_independent_clip(tmp_path, tokens):
    state = random_weights(open_clip.get_model_config("ViT-L-14-quickgelu"))
    images = pictures()
    pixels = torch.from_numpy(np.stack([clip_preprocess(image, 224) for image in images.values()]))
    expected = transformers_cosines(state, pixels, tokens)
    assert expected.std() > 1e-3  # the pictures and prompts do differ

    torch.save({"state_dict": state}, tmp_path / "hpc.pth")
    del state
    scorer = hps.load(tmp_path / "hpc.pth")
    (tmp_path / "hpc.pth").unlink()  # 0.9 GB
    images["I;16"].save(tmp_path / "grey.png")
    scores = scorer.score([*[*images.values()][:-1], tmp_path / "grey.png"], PROMPTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores / 100, expected, atol=1e-5, rtol=0)


def transformers_cosines(state: dict, pixels: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """Run the same weights through transformers' CLIPModel."""
    tower = {"hidden_act": "quick_gelu", "attention_dropout": 0.0}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPConfig(
        vision_config={**tower, **vision, "image_size": 224, "patch_size": 14},
        text_config={**tower, **text, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407},
        projection_dim=768,
    )
    with torch.device("meta"):
        model = CLIPModel(config).eval()
    converted = {}
    for key, value in state.items():
        value = value.float()
        key = key.replace("visual.transformer.resblocks", "vision_model.encoder.layers")
        key = key.replace("transformer.resblocks", "text_model.encoder.layers")
        for old, new in {
            "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "visual.ln_pre": "vision_model.pre_layrnorm",
            "visual.ln_post": "vision_model.post_layernorm", "ln_final": "text_model.final_layer_norm",
            "visual.conv1": "vision_model.embeddings.patch_embedding",
            "visual.class_embedding": "vision_model.embeddings.class_embedding",
            "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
            "token_embedding": "text_model.embeddings.token_embedding",
        }.items():  # fmt: skip
            key = key.replace(old, new)
        if "attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[key.replace("attn.in_proj_", f"self_attn.{name}_proj.")] = part
        elif key == "visual.proj":
            converted["visual_projection.weight"] = value.T
        elif key == "text_projection":
            converted["text_projection.weight"] = value.T
        elif key == "positional_embedding":
            converted["text_model.embeddings.position_embedding.weight"] = value
        else:
            converted[key] = value
    model.load_state_dict(converted, assign=True)
    model.vision_model.embeddings.position_ids = torch.arange(257)[None]
    model.text_model.embeddings.position_ids = torch.arange(77)[None]
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=pixels)
    return (output.image_embeds * output.text_embeds).sum(-1).numpy()


def test_tokens_equal_an_independent_tokenizer(tiny, tokens):
    ours = tiny.tokenizer(PROMPTS)
    length = (ours == 49407).int().argmax(1)  # where the first end is; behind it the padding may be anything
    assert length[4] == 76 and length[5] == 76  # cut, and the end is kept
    for ids, others, end in zip(ours, tokens, length, strict=True):
        assert ids[: end + 1].tolist() == others[: end + 1].tolist()


def test_preprocess_equals_the_formula(tiny):
    for mode, image in pictures().items():
        assert image.mode == mode
        np.testing.assert_allclose(tiny.preprocess(image), clip_preprocess(image, 32), atol=1e-6, err_msg=mode)


def test_pad_keeps_the_whole_picture_on_black(tiny_files):
    scorer = hps.load(tiny_files / "bare.pth", tiny_files / "tiny.json", resize="pad")
    black = -np.array([0.48145466 / 0.26862954, 0.4578275 / 0.26130258, 0.40821073 / 0.27577711])
    for mode in ("RGB", "RGBA", "L", "P", "CMYK"):
        pixels = scorer.preprocess(Image.new("RGB", (64, 32), "white").convert(mode)).numpy()
        assert pixels.shape == (3, 32, 32)
        assert np.allclose(pixels[:, :8].T, black) and np.allclose(pixels[:, 24:].T, black)
        assert (pixels[:, 8:24] > 1.9).all()  # white


def test_a_sliver_is_refused_before_it_fills_the_memory(tiny):
    with pytest.raises(ValueError, match="long and thin"):
        tiny.preprocess(Image.new("RGB", (200_000, 2)))


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory) -> Path:
    """A folder with one tiny classifier's weights in every form that a checkpoint may have."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    state = {key: value.float() for key, value in random_weights(TINY).items()}
    extras = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}
    torch.save(state, folder / "bare.pth")
    torch.save({"state_dict": state}, folder / "wrapped.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, folder / "module.pth")
    torch.save({"state_dict": {**extras, **state}}, folder / "jit_extras.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "model": TINY}, folder / "config_inside.pth")
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}, "model": TINY}, folder / "half.pth")
    save_file(state, folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:  # as torch.save does with tensors on a GPU
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"state_dict": state}, folder / "saved_on_gpu.pth")
    torch.save({"state_dict": {**random_weights(TINY, seed=1)}, "model": TINY}, folder / "other.pth")
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_files) -> hps.HPS:
    return hps.load(tiny_files / "bare.pth", tiny_files / "tiny.json")


@pytest.fixture(scope="module")
def expected(tiny) -> np.ndarray:
    return tiny.score(list(pictures().values()), PROMPTS)


@pytest.mark.parametrize(
    "name",
    ["wrapped.pth", "module.pth", "jit_extras.pth", "legacy.pth", "saved_on_gpu.pth", "weights.safetensors"],
)
def test_every_form_of_checkpoint_gives_the_same_scores(tiny_files, expected, name):
    scorer = hps.load(tiny_files / name, str(tiny_files / "tiny.json"))
    np.testing.assert_array_equal(scorer.score(list(pictures().values()), PROMPTS), expected)


def test_a_checkpoint_may_bring_its_config_and_its_resize(tiny_files, expected, tmp_path):
    images = list(pictures().values())
    for name in ("config_inside.pth", "half.pth"):
        np.testing.assert_allclose(hps.load(tiny_files / name).score(images, PROMPTS), expected, atol=1e-4)
    assert hps.load(tiny_files / "other.pth").score(images, PROMPTS) != pytest.approx(expected, abs=0.1)

    # What `load` found is what a checkpoint is to say, also when the JSON file is gone.
    first = hps.load(tiny_files / "bare.pth", tiny_files / "tiny.json", resize="pad")
    saved = {"state_dict": first.model.state_dict(), "model": first.config, "resize": first.resize}
    torch.save(saved, tmp_path / "hpc.pth")
    again = hps.load(tmp_path / "hpc.pth")
    assert again.resize == "pad"
    np.testing.assert_array_equal(again.score(images, PROMPTS), first.score(images, PROMPTS))
    with pytest.raises(UserError, match=r"hpc.pth: made with the pictures' resize 'pad', not with 'crop'"):
        hps.load(tmp_path / "hpc.pth", resize="crop")


def test_the_same_config_by_path_or_by_content_is_no_other_model(tiny_files):
    assert hps.load(tiny_files / "config_inside.pth", tiny_files / "tiny.json").config == TINY
    with pytest.raises(UserError, match="made with the model a config of its own, not with ViT-B-32"):
        hps.load(tiny_files / "config_inside.pth", "ViT-B-32")


def test_pretrained_may_be_a_file(tiny_files, expected):
    scorer = hps.load(model=str(tiny_files / "tiny.json"), pretrained=str(tiny_files / "weights.safetensors"))
    np.testing.assert_array_equal(scorer.score(list(pictures().values()), PROMPTS), expected)


def test_the_activation_matters(tiny_files, expected):
    plain = hps.load(tiny_files / "bare.pth", {**TINY, "quick_gelu": False})
    assert np.abs(plain.score(list(pictures().values()), PROMPTS) - expected).max() > 0.01


def refused(*args, **kwargs) -> str:
    """Return what `load` says, after checking that it is one line."""
    with pytest.raises(UserError) as caught:
        hps.load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_weights_are_counted_and_named(tiny_files, tmp_path):
    state = torch.load(tiny_files / "bare.pth")
    state["visual.proj"] = state["visual.proj"][:, :5]
    del state["ln_final.weight"], state["ln_final.bias"]
    state |= {f"head.{i}": torch.zeros(1) for i in range(5)}
    torch.save(state, tmp_path / "wrong.pth")
    said = refused(tmp_path / "wrong.pth", tiny_files / "tiny.json")
    assert "wrong.pth: not the weights of tiny-" in said
    assert "2 missing (ln_final.weight, ln_final.bias)" in said
    assert "5 unexpected (head.0, head.1, head.2, ...)" in said
    assert "1 of another shape (visual.proj (64, 5) instead of (64, 32))" in said
    assert "not the weights of RN50: " in refused(tiny_files / "bare.pth", "RN50")


class Planted:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_no_checkpoints_are_refused(tiny_files, tmp_path):
    good = (tiny_files / "bare.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "torn.safetensors").write_bytes((tiny_files / "weights.safetensors").read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("hello\nworld\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "planted.pth").write_bytes(pickle.dumps(Planted(tmp_path / "touched")))
    torch.save({"state_dict": {"a": torch.zeros(1)}, "optimizer": Planted(tmp_path / "touched")}, tmp_path / "p.pth")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "archive.pth")
    for name in ("torn.pth", "torn.safetensors", "text.pth", "empty.pth", "planted.pth", "p.pth", "archive.pth"):
        assert f"{name}: not a checkpoint of tensors (" in refused(tmp_path / name), name
    assert not (tmp_path / "touched").exists()

    for number, content in enumerate(({"state_dict": {}}, [1, 2], {"epoch": 3}, torch.zeros(2))):
        torch.save(content, tmp_path / f"{number}.pth")
        assert f"{number}.pth: holds no weights" in refused(tmp_path / f"{number}.pth")
    assert refused(tmp_path / "nowhere.pth").endswith("nowhere.pth: no such file")
    assert refused(tmp_path) == f"{tmp_path}: no such file"


def test_models_that_are_none_are_refused(tiny_files, tmp_path):
    checkpoint = tiny_files / "bare.pth"
    assert "no open_clip model is called 'ViT-L/14'; near it are " in refused(checkpoint, "ViT-L/14")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"embed_dim": 3}')
    (tmp_path / "odd.json").write_text(json.dumps({**TINY, "vision_cfg": {"layers": "many"}}))
    assert "broken.json: not valid JSON" in refused(checkpoint, tmp_path / "broken.json")
    assert "other.json: no open_clip config: vision_cfg, text_cfg missing" in refused(
        checkpoint, tmp_path / "other.json"
    )
    assert "cannot be built: " in refused(checkpoint, tmp_path / "odd.json")
    assert "nowhere.json: no such file" in refused(checkpoint, tmp_path / "nowhere.json")
    assert "'nothing' is not a known tag" in refused(model="ViT-B-32", pretrained="nothing")
    assert "give either" in refused()
    assert "resize should be" in refused(checkpoint, tiny_files / "tiny.json", resize="squash")


def test_pretrained_weights_for_the_other_activation_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: "not fetched")
    assert "QuickGELU mismatch" in refused(model="ViT-L-14", pretrained="openai")


def test_scores_do_not_depend_on_the_batch_size(tiny, expected):
    for batch_size in (1, 3, 7, 100):
        scores = tiny.score(list(pictures().values()), PROMPTS, batch_size=batch_size)
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_score_takes_one_prompt_for_all_paths_and_nothing(tiny, tmp_path):
    image = pictures()["RGB"]
    image.save(tmp_path / "a.png")
    both = tiny.score([image, tmp_path / "a.png"], "a cat")
    np.testing.assert_array_equal(both, tiny.score([image, image], ["a cat", "a cat"]))
    assert tiny.score(str(tmp_path / "a.png"), "a cat") == pytest.approx(both[:1], abs=1e-4)
    assert tiny.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        tiny.score([image, image], ["a cat"])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(UserError, match=r"b\.png: not a readable picture"):
        tiny.score([tmp_path / "b.png"], "a cat")


def test_features_are_unit_vectors_in_every_precision(tiny, tiny_files, expected):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = tiny.encode_images(pixels), tiny.encode_prompts(PROMPTS)
    for precision, tolerance in {"fp32": 1e-4, "fp16": 0.1}.items():
        scorer = hps.load(tiny_files / "bare.pth", tiny_files / "tiny.json", precision=precision)
        for features, others in zip((scorer.encode_images(pixels), scorer.encode_prompts(PROMPTS)), exact, strict=True):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)), atol=1e-6, rtol=0)
            assert ((features - others).abs().max() > 1e-5) == (precision != "fp32")
        scores = scorer.score(list(pictures().values()), PROMPTS)
        np.testing.assert_allclose(scores, expected, atol=tolerance)


def test_preprocess_and_tokenizer_travel_to_worker_processes(tiny):
    image = pictures()["RGBA"]
    copy = pickle.loads(pickle.dumps(tiny.preprocess))
    assert torch.equal(copy(image), tiny.preprocess(image))
