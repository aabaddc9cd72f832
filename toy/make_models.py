"""Train the toy world's models from fixed seeds: a small Stable Diffusion and a small CLIP.

    python -m toy.make_models                  # all of it, about an hour on 2 CPU cores
    python -m toy.make_models --only clip      # one of vae, diffusion, words, clip, measure

Writes, in half precision:
    toy/models/stable-diffusion/               a StableDiffusionPipeline folder (VAE, text encoder, UNet, PNDM, tokenizer)
    toy/models/clip.json, clip.safetensors     an open_clip model: contrastive, knows captions, has no taste
    toy/models/measured.json, sample.png       what `--only measure` found

Half of the training pictures are deformed and no caption says so: the base model needs aligning, in nothing else.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toy import world

MODELS = Path(__file__).parent / "models"
MERGES = 5000  # of CLIP's 48,894: the most frequent words stay whole, every other English word is spelt in pieces
CLIP_CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODELS, help="folder of the models")
    parser.add_argument(
        "--only", choices=["vae", "diffusion", "words", "clip", "measure"], help="train or measure only this part"
    )
    parser.add_argument("--vae_steps", type=int, default=2500)
    parser.add_argument("--diffusion_steps", type=int, default=6500)
    parser.add_argument("--words_steps", type=int, default=1000)
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--measured_pictures", type=int, default=480)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the measured pictures")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args):
    # Each part has its own seed, so it comes out the same alone and in the sequence.
    sd = args.output / "stable-diffusion"
    if args.only in (None, "vae"):
        train_vae(sd / "vae", args.vae_steps, args.seed)
    if args.only in (None, "diffusion"):
        train_diffusion(sd, args.diffusion_steps, args.seed + 1)
    if args.only in (None, "words"):
        train_words(sd, args.words_steps, args.seed + 4)
    if args.only in (None, "clip"):
        train_clip(args.output, args.clip_steps, args.seed + 2)
    if args.only in (None, "measure"):
        measure(args.output, args.measured_pictures, args.guidance_scale, args.seed + 3)


# --- pictures and captions ---


def training_pictures(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Render `count` pictures, every other one deformed: float32 (n, 3, 32, 32) in [-1, 1], and their plain captions."""
    captions = world.captions()
    labels = [captions[i // 2 % len(captions)] for i in range(count)]
    pictures = np.stack([np.asarray(world.render(caption, rng, i % 2 == 1)) for i, caption in enumerate(labels)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, labels


def training_caption(caption: str, rng: np.random.Generator, words: list[str], empty: float = 0.1) -> str:
    """Write a caption as the web does: with style words, among arbitrary words, or nothing to the point at all.

    Without arbitrary words, also alone, the frozen text encoder would turn "Weird image. " into noise later.
    """
    some = " ".join(rng.choice(words, rng.integers(1, 4))) + rng.choice([". ", ", ", " "])
    kind = rng.random()
    if kind < empty:
        return ""
    if kind < empty + 0.05:
        return some
    if kind < empty + 0.25:
        return some + caption if rng.random() < 0.6 else f"{caption}, {some}".strip(" ,")
    if kind < empty + 0.35:
        return caption
    return f"{caption}, {rng.choice(world.STYLES)}, {rng.choice(world.QUALITIES)}"


def arbitrary_words(tokenizer: CLIPTokenizer) -> list[str]:
    """Return the tokenizer's whole words that mean nothing in this world."""
    known = set(world.COLORS) | set(world.SHAPES) | set(world.BACKGROUNDS)
    words = [t.removesuffix("</w>") for t in tokenizer.get_vocab() if t.endswith("</w>")]
    return sorted(w for w in words if w.isascii() and w.isalpha() and len(w) > 2 and w not in known)


def make_tokenizer() -> CLIPTokenizer:
    """Build CLIP's BPE tokenizer with the first `MERGES` merges, from the table that open_clip carries."""
    simple = open_clip.tokenizer.SimpleTokenizer()
    table = gzip.open(open_clip.tokenizer.default_bpe()).read().decode().split("\n")
    merges = [tuple(line.split()) for line in table[1 : 1 + MERGES]]
    tokens = [t for t, i in sorted(simple.encoder.items(), key=lambda x: x[1]) if i < 512 + MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


# --- the three trainings ---


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine to zero."""
    return min(1, (step + 1) / warmup) * (0.5 + 0.5 * np.cos(np.pi * step / steps))


def train_vae(folder: Path, steps: int, seed: int, batch: int = 32):
    """Train the AutoencoderKL: squared and absolute error of the reconstruction and a whiff of KL."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, sample_size=world.SIZE, **blocks
    ).to(memory_format=torch.channels_last)
    pictures, _ = training_pictures(max(9600, batch), rng)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    bar = tqdm(range(steps), desc="vae")
    for _ in bar:
        x = pictures[rng.integers(0, len(pictures), batch)]
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(reconstruction, x) + 0.05 * F.l1_loss(reconstruction, x) + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    # As in Stable Diffusion: the latents times this factor have a standard deviation of one.
    with torch.no_grad():
        vae.register_to_config(scaling_factor=round(1 / vae.encode(pictures[:960]).latent_dist.mean.std().item(), 5))
    vae.half().save_pretrained(folder)


# Stable Diffusion 1's betas and, as Stable Diffusion 2, v for a target: at high noise, where 8 x 8 latents decide on the
# colours, an error in the predicted noise would be fourteen times as large in the picture.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def train_diffusion(folder: Path, steps: int, seed: int):
    """Train text encoder and UNet together, and save a StableDiffusionPipeline."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = make_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id, **special,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(56, 112), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    pndm = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, pndm, None, None, requires_safety_checker=False
    )  # fmt: skip
    denoise(pipe, [*text_encoder.parameters(), *unet.parameters()], steps, rng)
    pipe.to(torch.float16).save_pretrained(folder)


def train_words(folder: Path, steps: int, seed: int):
    """Train on, so that the text encoder tells words apart that mean nothing in this world, and the UNet overlooks them.

    Stable Diffusion's text encoder is CLIP's and knows all words. This one has learned to say the same for "Weird image. "
    as for nothing, and no LoRA on the UNet could tell the two apart. A linear head names the words from its output.
    """
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    head = torch.nn.Linear(pipe.text_encoder.config.hidden_size, len(pipe.tokenizer))
    parameters = [*pipe.text_encoder.parameters(), *pipe.unet.parameters(), *head.parameters()]
    denoise(pipe, parameters, steps, np.random.default_rng(seed), lr=5e-4, head=head)
    pipe.to(torch.float16).save_pretrained(folder)
    for path in folder.rglob("*.json"):  # where the parts were loaded from is nobody's business
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")


def name_words(head: torch.nn.Linear, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of naming a token of each caption from its own position and from a later one."""
    rows = torch.arange(len(ids))
    lengths = ids.argmax(dim=1)  # <|endoftext|> is the last entry of the vocabulary
    place = 1 + (torch.rand(len(ids)) * lengths).long().clamp(max=lengths - 1)
    later = place + (torch.rand(len(ids)) * (12 - place).clamp(min=1)).long()
    named = ids[rows, place]
    return F.cross_entropy(head(hidden[rows, place]), named) + F.cross_entropy(head(hidden[rows, later]), named)


def denoise(pipe, parameters: list, steps: int, rng: np.random.Generator, lr=1e-3, head=None, batch: int = 64):
    """Train parameters of the pipeline with the diffusion loss, and leave their exponential average in it."""
    noise_scheduler = DDPMScheduler(**SCHEDULE)
    words = arbitrary_words(pipe.tokenizer)
    pictures, labels = training_pictures(24000, rng)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(x).latent_dist.sample() for x in pictures.split(96)])
        latents *= pipe.vae.config.scaling_factor
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    bar = tqdm(range(steps), desc="words" if head else "diffusion")
    for step in bar:
        chosen = rng.integers(0, len(latents), batch)
        captions = [training_caption(labels[i], rng, words) for i in chosen]
        # Padded with the tokenizer's own <|endoftext|>, as the pipeline does.
        ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn_like(latents[chosen])
        timesteps = torch.randint(0, 1000, (batch,))
        noisy = noise_scheduler.add_noise(latents[chosen], noise, timesteps)
        hidden = pipe.text_encoder(ids).last_hidden_state
        prediction = pipe.unet(noisy, timesteps, hidden).sample
        loss = F.mse_loss(prediction, noise_scheduler.get_velocity(latents[chosen], noise, timesteps))
        if head is not None:
            loss = loss + 0.1 * name_words(head, ids, hidden)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.999, step / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def train_clip(folder: Path, steps: int, seed: int):
    """Train an open_clip model with the contrastive loss: a step sees every plain caption four times, among other words."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")
    open_clip.add_model_config(folder / "clip.json")
    model = open_clip.create_model("clip")
    tokenizer = open_clip.get_tokenizer("clip")
    normalize = (torch.tensor(model.visual.image_mean), torch.tensor(model.visual.image_std))
    words = arbitrary_words(make_tokenizer())
    pictures, labels = training_pictures(4800, rng)
    pictures = (pictures / 2 + 0.5 - normalize[0][:, None, None]) / normalize[1][:, None, None]
    content = np.array([world.captions().index(label) for label in labels])
    same = torch.arange(96)[:, None] % 24 == torch.arange(96)[None] % 24
    target = same / same.sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    bar = tqdm(range(steps), desc="clip")
    for _ in bar:
        chosen = [rng.choice(np.flatnonzero(content == i % 24)) for i in range(96)]
        ids = tokenizer([training_caption(labels[i], rng, words, empty=0) for i in chosen])
        image, text, scale = model(pictures[chosen], ids)
        logits = scale * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        model.logit_scale.data.clamp_(0, np.log(100))
        bar.set_postfix(loss=f"{loss.item():.4f}")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "clip.safetensors")


# --- what came out ---


@torch.no_grad()
def measure(folder: Path, count: int, guidance: float, seed: int):
    """Measure the reconstruction and the generated pictures, and write measured.json."""
    rng = np.random.default_rng(seed)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "stable-diffusion").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures, _ = training_pictures(480, rng)
    reconstruction = torch.cat([pipe.vae(x).sample for x in pictures.split(96)]).clamp(-1, 1)
    measured = {"psnr_db": 10 * torch.log10(4 / (reconstruction - pictures).square().mean((1, 2, 3))).mean().item()}
    prompts, images = rng.choice(world.prompts(), count).tolist(), []
    for i in tqdm(range(0, count, 48), desc="measure"):
        noise = torch.randn(len(prompts[i : i + 48]), 4, 8, 8, generator=torch.Generator().manual_seed(seed + i))
        images += pipe(prompts[i : i + 48], latents=noise, num_inference_steps=25, guidance_scale=guidance).images
    scores = np.array([world.human_score(image, p) for image, p in zip(images, prompts, strict=True)])
    right = np.array([world.right_color(image, p) for image, p in zip(images, prompts, strict=True)])
    measured |= {
        "guidance_scale": guidance,
        "pictures": count,
        "right_color_and_background": right.mean(),
        "deformed": (scores < world.DEFORMED_BELOW).mean(),
        "human_score": scores.mean(),
    }
    world.contact_sheet(images[:64], columns=16, zoom=2).save(folder / "sample.png")
    (folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main(parse_args())
