"""Train the small autoencoder of ``experiment=emoji``: f = 4, 4 channels, a folder of diffusers.

    python -m benchmarks.emoji_autoencoder --out outputs/emoji/autoencoder --seconds 120

The loss is L1 of the image + L1 of its differences between neighbours + ``KL`` times the mean
divergence of a latent's posterior from N(0, 1). The learning rate rises over a twentieth of the
budget and falls by half a cosine to zero at its end; the budget is seconds of training, or steps,
which makes a run repeatable. It runs on the GPU if there is one. ``sag_dit.data.emoji`` says which
emoji it learns; their mirror images are as good, whatever they show.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn.functional import l1_loss
from torchvision.utils import make_grid

from sag_dit.codec import from_pixels, to_pixels
from sag_dit.data.emoji import emoji

WIDTHS, LAYERS = (48, 96, 96), 1
TINY = (8, 8, 16)
KL = 1e-3
WARM = 0.05


def build(widths: tuple[int, ...], layers: int) -> AutoencoderKL:
    """Return a fresh autoencoder: three levels of convolutions and no attention."""
    levels = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what changes from a pixel to the next one below and to the right."""
    return images.diff(dim=-2), images.diff(dim=-1)


def loss_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the loss of a batch in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    drawn = vae.decode(posterior.sample()).sample
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    loss = l1_loss(drawn.float(), images) + KL * divergence
    for ours, real in zip(differences(drawn.float()), differences(images), strict=True):
        loss = loss + l1_loss(ours, real)
    return loss


def rate(progress: float) -> float:
    """Return the share of the greatest learning rate after a share of the budget."""
    if progress < WARM:
        return 0.04 + 0.96 * progress / WARM
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - WARM) / (1 - WARM)))


def train(
    vae: AutoencoderKL, pixels: Tensor, batch: int, peak: float, seconds: float, steps: int | None
) -> int:
    """Train on uint8 images (n, 3, 64, 64) and return the number of steps."""
    device = pixels.device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu
    )
    begun, step, told = time.monotonic(), 0, 0.0
    total = torch.zeros((), device=device)
    while True:
        elapsed = time.monotonic() - begun
        progress = elapsed / seconds if steps is None else step / steps
        if progress >= 1:
            return step
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(progress)
        chosen = torch.randint(len(pixels), (batch,), device=device)
        images = from_pixels(pixels[chosen]).contiguous(memory_format=torch.channels_last)
        mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(vae, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        total = torch.lerp(loss.detach(), total, 0.0 if step == 1 else 0.98)
        if elapsed - told > 10:
            told = elapsed
            print(f"step {step}, {elapsed:.0f} s, loss {float(total):.4f}", flush=True)


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the images of the posteriors' means, uint8."""
    parts = []
    with torch.no_grad():
        for part in pixels.split(128):
            mean = vae.encode(from_pixels(part)).latent_dist.mean
            parts.append(to_pixels(vae.decode(mean).sample))
    return torch.cat(parts)


def psnr(drawn: Tensor, real: Tensor) -> tuple[float, float]:
    """Return the mean of the images' PSNR in dB, and the PSNR of their mean squared error."""
    errors = (drawn.float() - real.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-2)
    each = 10 * torch.log10(255**2 / errors)
    return float(each.mean()), float(10 * torch.log10(255**2 / errors.mean()))


def scaling_factor(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return 1 / the standard deviation of the latents, drawn from their posteriors."""
    parts = []
    with torch.no_grad():
        for part in pixels.split(128):
            parts.append(vae.encode(from_pixels(part)).latent_dist.sample())
    return round(1 / float(torch.cat(parts).std()), 5)


def save_pairs(real: Tensor, drawn: Tensor, file: Path, count: int = 48) -> None:
    """Draw images above their reconstructions, evenly chosen, twice as large."""
    chosen = torch.linspace(0, len(real) - 1, min(count, len(real))).long()
    rows = []
    for part in chosen.split(16):
        rows += [real[part], drawn[part]]
    grid = make_grid(torch.cat(rows).cpu(), nrow=16, padding=1)
    picture = Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(file)


def main() -> None:
    """Train, tell the PSNR of held-out emoji, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200, help="of training")
    parser.add_argument("--steps", type=int, help="instead of seconds")
    parser.add_argument("--batch", type=int, help="images in a step; 64 on a GPU, else 16")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="greatest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a very small network")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    pixels = emoji("train")[0].to(device)
    vae = build(TINY if options.tiny else WIDTHS, LAYERS)
    vae = vae.to(device, memory_format=torch.channels_last).train()
    batch = options.batch or (64 if device.type == "cuda" else 16)
    steps = train(vae, pixels, batch, options.rate, options.seconds, options.steps)
    # What is shipped is what is measured: weights rounded to half precision, sums in float32.
    vae.eval().half().float()
    factor = scaling_factor(vae, torch.cat([pixels, pixels.flip(-1)]))
    vae.register_to_config(scaling_factor=factor)
    measured: dict[str, object] = {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "steps": steps,
        "batch": batch,
        "scaling_factor": factor,
    }
    for split in ("tune", "report"):
        real = emoji(split)[0].to(device)  # type: ignore[arg-type]
        drawn = reconstruct(vae, real)
        mean, of_mean = psnr(drawn, real)
        measured[f"psnr_{split}"], measured[f"psnr_of_mean_error_{split}"] = mean, of_mean
        if split == "tune":
            options.out.mkdir(parents=True, exist_ok=True)
            save_pairs(real, drawn, options.out / "reconstructions.png")
    vae.half().to("cpu", memory_format=torch.contiguous_format).save_pretrained(options.out)
    (options.out / "measured.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
