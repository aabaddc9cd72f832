"""Exporting a LoRA: exact round trips, and what other programs make of the files."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import SD
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

import export_lora
from utils import lora
from utils.errors import UserError

SIZES = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768}
METADATA = {"base_model": SD, "negative_prompt": "Weird image. ", "options": '{"lora_rank": 8}'}


def export(source, output, layout, *options):
    command = ["--unet_weight", str(source), "--output", str(output), "--format", layout, *map(str, options)]
    export_lora.main(export_lora.parse_args(command))
    return output


def random_lora(unet, rank=4, alpha=None) -> dict[str, lora.Matrices]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(lora.TARGET_MODULES)):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator) / 100
            found[name.replace(".", "_")] = lora.Matrices(down, up, alpha or rank)
    return found


@pytest.fixture(scope="module")
def full_size():
    """SD 1.4's UNet, of which only the attention's projections have memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES)
    generator = torch.Generator().manual_seed(1)
    for name, module in unet.named_modules():
        if name.endswith(tuple(lora.TARGET_MODULES)):
            module.weight = torch.nn.Parameter(torch.randn(module.weight.shape, generator=generator) / 30)
    return unet


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a.down, other[name].down) and torch.equal(a.up, other[name].up) and a.alpha == other[name].alpha
        for name, a in one.items()
    )


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (8, 8), (8, 2), (3, 1)])
def test_round_trips_are_exact(full_size, tmp_path, rank, alpha):
    matrices = random_lora(full_size, rank, alpha)
    file = tmp_path / "0.safetensors"
    lora.write(file, matrices, "diffusers", METADATA)
    route = ["kohya", "diffusers", "kohya", "diffusers"] + ["legacy", "kohya", "legacy"] * (rank == alpha)
    for i, layout in enumerate(route, 1):
        file = export(file, tmp_path / f"{i}.{'bin' if layout == 'legacy' else 'safetensors'}", layout)
        assert same(lora.read(file), matrices)
        if i <= 4:
            assert METADATA.items() <= lora.header(file).items()
    # The legacy layout has no alpha: the sum that is added to the weights is what stays.
    legacy = lora.read(export(tmp_path / "0.safetensors", tmp_path / "legacy.bin", "legacy"))
    for name, (down, up, _) in matrices.items():
        assert torch.equal(legacy[name].down, down) and legacy[name].alpha == rank
        torch.testing.assert_close(legacy[name].up, up * alpha / rank, rtol=1e-6, atol=0)


def test_each_module_may_have_its_own_rank_and_alpha(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(SD)
    matrices = random_lora(pipe.unet)
    for i, (name, (down, up, _)) in enumerate(matrices.items()):
        matrices[name] = lora.Matrices(down[: i % 3 + 1].clone(), up[:, : i % 3 + 1].clone(), [1.0, 2.5, 4.0][i % 3])
    lora.write(tmp_path / "kohya.safetensors", matrices, "kohya")
    file = export(tmp_path / "kohya.safetensors", tmp_path / "lora.safetensors", "diffusers")
    assert same(lora.read(file), matrices)
    assert_diffusers_loads(pipe, file, matrices)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [8, 2])
def test_diffusers_loads_it(tmp_path, layout, alpha):
    pipe = StableDiffusionPipeline.from_pretrained(SD)
    matrices = random_lora(pipe.unet, 8, alpha)
    lora.write(tmp_path / "lora.safetensors", matrices, "diffusers")
    assert_diffusers_loads(pipe, export(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", layout), matrices)


def assert_diffusers_loads(pipe, file, matrices):
    """The adapted weights are W + alpha / rank * up @ down in every module."""
    before = {name: module.weight.clone() for name, module in pipe.unet.named_modules() if hasattr(module, "weight")}
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, weight in before.items():
        expected = weight
        if name.replace(".", "_") in matrices:
            down, up, alpha = matrices[name.replace(".", "_")]
            expected = weight + alpha / down.shape[0] * up @ down
        torch.testing.assert_close(pipe.unet.get_submodule(name).weight, expected, rtol=0, atol=1e-5)


def original_names() -> dict[str, str]:
    """Return Stable Diffusion's own name of every attention by the name that the web interfaces look it up with.

    input_blocks counts the first convolution, then in each of the levels two pairs of residual block and attention and
    a downsampling; output_blocks has three pairs a level; the last level of the former and the first of the latter have
    no attention.
    """
    names = {"mid_block_attentions_0": "middle_block.1"}
    for level in range(3):
        for i in range(2):
            names[f"down_blocks_{level}_attentions_{i}"] = f"input_blocks.{1 + 3 * level + i}.1"
        for i in range(3):
            names[f"up_blocks_{level + 1}_attentions_{i}"] = f"output_blocks.{3 * (level + 1) + i}.1"
    return names


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (8, 2)])
def test_kohya_file_by_the_web_interfaces_rule(full_size, tmp_path, rank, alpha):
    """W + alpha / rank * up @ down on the checkpoint in Stable Diffusion's own names, as AUTOMATIC1111 and ComfyUI do."""
    matrices = random_lora(full_size, rank, alpha)
    lora.write(tmp_path / "lora.safetensors", matrices, "diffusers", METADATA)
    state = load_file(export(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", "kohya"))
    assert len(state) == 32 * 4 * 3

    # The checkpoint as it is distributed, and the table from a file's keys to its weights.
    checkpoint, table = {}, {}
    for block, original in original_names().items():
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                place = f"transformer_blocks.0.{attention}.{projection}"
                ours = f"{block.replace('_attentions_', '.attentions.').replace('blocks_', 'blocks.')}.{place}"
                key = f"model.diffusion_model.{original}.{place}.weight"
                checkpoint[key] = full_size.get_submodule(ours).weight.detach().clone()
                table[f"lora_unet_{block}_{place.replace('.', '_')}"] = (key, ours)
    for name in {key.split(".")[0] for key in state}:
        up, down = state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"]
        scale = state[f"{name}.alpha"].item() / down.shape[0]
        checkpoint[table[name][0]] += scale * torch.mm(up, down)

    before = {ours: full_size.get_submodule(ours).weight.detach().clone() for _, ours in table.values()}
    lora.fuse(full_size, lora.read(tmp_path / "lora.safetensors"))
    for key, ours in table.values():
        weight = full_size.get_submodule(ours).weight
        torch.testing.assert_close(checkpoint[key], weight.detach(), rtol=0, atol=1e-6)
        assert not torch.equal(weight, before[ours])
        weight.data = before[ours]

    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == (str(rank), alpha)
    assert (header["ss_base_model_version"], header["ss_v2"]) == ("sd_v1", "False") and "Weird image. " in header[
        "ss_training_comment"
    ]


def test_fused_is_a_pipeline_of_its_own(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(SD, dtype=torch.float32)
    matrices = random_lora(pipe.unet)
    lora.write(tmp_path / "lora.safetensors", matrices, "kohya", METADATA)
    output = export(tmp_path / "lora.safetensors", tmp_path / "fused", "fused", "--precision", "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "lora.safetensors"]
    fused = StableDiffusionPipeline.from_pretrained(output, dtype=torch.float32)
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear):
            down, up, alpha = matrices.get(name.replace(".", "_"), (torch.zeros(1, 1), torch.zeros(1, 1), 0))
            expected = module.weight + alpha / down.shape[0] * up @ down
            torch.testing.assert_close(fused.unet.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="exists; use --overwrite"):
        export(tmp_path / "lora.safetensors", output, "fused")
    export(tmp_path / "lora.safetensors", output, "fused", "--overwrite")
    half = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_mistakes(tmp_path):
    matrices = {"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": lora.Matrices(*torch.ones(2, 4, 4), 4.0)}
    lora.write(tmp_path / "lora.safetensors", matrices, "kohya")
    for options, message in (
        (("lora.safetensors", "x.safetensors", "legacy"), "--format legacy is a .bin file"),
        (("none", "x.safetensors", "kohya"), "none: no such file"),
        (("lora.safetensors", "lora.safetensors", "diffusers"), "exists; use --overwrite"),
        (("lora.safetensors", "x", "fused", "--pretrained_model_name_or_path", SD), "does not fit this UNet"),
        (("lora.safetensors", "x", "fused", "--pretrained_model_name_or_path", tmp_path), "--pretrained_model_name"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / options[0], tmp_path / options[1], *options[2:])
    strange = {"input_blocks_1_1_attn1_to_q": next(iter(matrices.values()))}
    lora.write(tmp_path / "strange.safetensors", strange, "kohya")
    with pytest.raises(UserError, match="'input_blocks_1_1_attn1_to_q' is no module of a UNet in diffusers' names"):
        export(tmp_path / "strange.safetensors", tmp_path / "x.safetensors", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "strange.safetensors"]
    command = [sys.executable, "export_lora.py", "--unet_weight", "none", "--output", "x.bin", "--format", "legacy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: none: no such file\n")


def test_what_training_writes_is_told_by_the_file(tmp_path):
    settings = {"pretrained_model_name_or_path": "a/model", "negative_prefix": "Weird image. ", "lora_rank": 4}
    unet = UNet2DConditionModel.from_pretrained(SD, subfolder="unet")
    matrices = random_lora(unet)
    lora.attach(unet, matrices)
    lora.save(tmp_path, unet, lora.training_metadata(settings))
    assert same(lora.read(tmp_path), matrices)
    header = lora.header(export(tmp_path, tmp_path / "kohya.safetensors", "kohya"))
    assert header["base_model"] == header["ss_sd_model_name"] == "a/model"
    assert json.loads(header["options"]) == settings
