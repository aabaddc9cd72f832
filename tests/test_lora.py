"""LoRA files: the three layouts agree, attaching adds alpha / rank * up @ down, and nothing is left out silently."""

import pytest
import torch
from conftest import SD
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from utils import lora
from utils.errors import UserError

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def toy_unet():
    return UNet2DConditionModel.from_pretrained(SD, subfolder="unet").float()


def random_matrices(unet, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return down and up of every attention projection, by diffusers' module name."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(lora.TARGET_MODULES)):
            down = torch.randn(rank, module.in_features, generator=generator) / 8
            found[name] = (down, torch.randn(module.out_features, rank, generator=generator) / 8)
    return found


def write(path, matrices, layout: str, alpha: float | None = None):
    """Write the file as each program does, from the names that facts about the layouts give."""
    state = {}
    for name, (down, up) in matrices.items():
        if layout == "legacy":
            attention, projection = name.replace(".to_out.0", ".to_out").rsplit(".", 1)
            keys = [f"{attention}.processor.{projection}_lora.{part}.weight" for part in ("down", "up")]
        elif layout == "modern":
            keys = [f"unet.{name}.lora.{part}.weight" for part in ("down", "up")]
        elif layout == "peft":
            keys = [f"unet.{name}.lora_{part}.weight" for part in ("A", "B")]
        else:
            keys = [f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight" for part in ("down", "up")]
            state[keys[0].replace("lora_down.weight", "alpha")] = torch.tensor(float(alpha or down.shape[0]))
        state |= dict(zip(keys, (down.contiguous(), up.contiguous()), strict=True))
    torch.save(state, path) if layout == "legacy" else save_file(state, path)
    return path


@pytest.mark.parametrize("layout", ["legacy", "modern", "peft", "kohya"])
@pytest.mark.parametrize("rank", [2, 4])
def test_every_layout_adds_up_times_down(tmp_path, layout, rank):
    unet = toy_unet()
    matrices = random_matrices(unet, rank)
    file = write(tmp_path / ("adapted_model.bin" if layout == "legacy" else "lora.safetensors"), matrices, layout)

    adapted, merged = toy_unet(), toy_unet()
    lora.attach(adapted, lora.read(file))
    for name, (down, up) in matrices.items():
        merged.get_submodule(name).weight.data += up @ down

    latents, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64)
    with torch.no_grad():
        base, a, m = (u(latents, 500, prompt).sample for u in (unet, adapted, merged))
        torch.testing.assert_close(a, m, rtol=0, atol=2e-5)
        assert (a - base).abs().max() > 1e-2
        adapted.fuse_lora()
        adapted.unload_lora()
        torch.testing.assert_close(adapted(latents, 500, prompt).sample, m, rtol=0, atol=2e-5)
    lora.fuse(unet, lora.read(file))
    for name in matrices:
        torch.testing.assert_close(unet.get_submodule(name).weight, merged.get_submodule(name).weight)


def test_alpha_unequal_to_rank_scales(tmp_path):
    unet = toy_unet()
    name, (down, up) = next(iter(random_matrices(unet, 8).items()))
    write(tmp_path / "kohya.safetensors", {name: (down, up)}, "kohya", alpha=2)
    lora.attach(unet, lora.read(tmp_path / "kohya.safetensors"))
    before = toy_unet().get_submodule(name).weight
    unet.fuse_lora()
    torch.testing.assert_close(unet.get_submodule(name).base_layer.weight, before + 2 / 8 * up @ down)
    half = toy_unet().half()
    lora.fuse(half, lora.read(tmp_path / "kohya.safetensors"), scale=0.5)
    fused = (before.half().float() + 0.5 * 2 / 8 * up @ down).half()
    torch.testing.assert_close(half.get_submodule(name).weight, fused, rtol=1e-3, atol=1e-6)


def test_saved_file_reads_back_exactly_and_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    matrices = random_matrices(toy_unet(), 4)
    unet = toy_unet()
    lora.attach(unet, lora.read(write(tmp_path / "in.safetensors", matrices, "modern")))
    lora.save(tmp_path / "out", unet)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]

    for name, (down, up) in matrices.items():
        got = lora.read(tmp_path / "out")[name.replace(".", "_")]
        assert torch.equal(got.down, down) and torch.equal(got.up, up) and got.alpha == 4
    pipe = StableDiffusionPipeline.from_pretrained(SD)
    pipe.load_lora_weights(tmp_path / "out")
    assert len([n for n, _ in pipe.unet.named_modules() if n.endswith("lora_A.default_0")]) == len(matrices)


def test_stable_diffusion_has_the_128_modules_of_the_paper():
    config = {
        "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(name.endswith(tuple(lora.TARGET_MODULES)) for name, _ in unet.named_modules()) == 32 * 4


def test_what_does_not_fit_is_an_error(tmp_path):
    unet = toy_unet()
    right = random_matrices(unet, 4)

    other = {f"{ATTENTION.replace('down_blocks.1', 'down_blocks.7')}.to_q": right[f"{ATTENTION}.to_q"]}
    with pytest.raises(UserError, match="1 of its 1 modules are not there, such as down_blocks_7"):
        lora.attach(unet, lora.read(write(tmp_path / "a.safetensors", other, "modern")))
    with pytest.raises(UserError, match="1 of its 2 modules are not there"):
        both = {f"{ATTENTION}.to_k": right[f"{ATTENTION}.to_k"]} | other
        lora.fuse(unet, lora.read(write(tmp_path / "a.safetensors", both, "modern")))
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), toy_unet().parameters(), strict=True))

    wide = {f"{ATTENTION}.to_q": (torch.zeros(4, 320), torch.zeros(320, 4))}
    with pytest.raises(UserError, match=r"is \(112, 112\), the LoRA is for \(320, 320\)"):
        lora.attach(unet, lora.read(write(tmp_path / "b.bin", wide, "legacy")))

    half = load_file(write(tmp_path / "c.safetensors", right, "modern"))
    del half[f"unet.{ATTENTION}.to_q.lora.up.weight"]
    save_file(half, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="incomplete"):
        lora.read(tmp_path / "c.safetensors")

    save_file({"vae.weight": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="no LoRA weight"):
        lora.read(tmp_path / "d.safetensors")
    (tmp_path / "e.bin").write_text("hello")
    with pytest.raises(UserError, match="neither"):
        lora.read(tmp_path / "e.bin")
    with pytest.raises(UserError, match="no such file"):
        lora.read(tmp_path / "nowhere")
