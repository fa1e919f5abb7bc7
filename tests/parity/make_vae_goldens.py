"""Runs the autoencoder of hustvl/LightningDiT (VA-VAE, a quarter as wide) on fixed weights.

Needs a checkout of hustvl/LightningDiT, which this project neither contains nor imports anywhere
else. From the root of the repository, on a CPU:

    python -m tests.parity.make_vae_goldens PATH/TO/LightningDiT

It writes `vae_goldens.safetensors` beside this file: what the autoencoder gives, and in the
metadata the names and shapes of its weights. The tests that read it need no checkout.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDENS = Path(__file__).with_name("vae_goldens.safetensors")
WIDTH, CHANNELS = 32, 32


def drawn(name: str, shape: Sequence[int]) -> Tensor:
    """Fixed numbers that depend on a name alone, from a stream that numpy never changes."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


def weights(layout: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights under which activations keep their size; gains of norms are about 1."""
    state = {}
    for name, shape in layout.items():
        each = drawn(name, shape)
        if len(shape) > 1:
            state[name] = each / float(np.prod(shape[1:])) ** 0.5
        else:
            state[name] = each / 10 + ("norm" in name and name.endswith("weight"))
    return state


def images() -> Tensor:
    """Two images of 8 bits."""
    return (drawn("images", (2, 3, 32, 32)) * 60 + 128).clamp(0, 255).to(torch.uint8)


def statistics() -> dict[str, Tensor]:
    """What LightningDiT keeps of latents, in its shapes."""
    shape = (1, CHANNELS, 1, 1)
    return {"mean": drawn("mean", shape), "std": drawn("std", shape).abs() + 0.5}


def main() -> None:
    """Write the goldens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("lightningdit", help="a checkout of hustvl/LightningDiT")
    sys.path.insert(0, parser.parse_args().lightningdit)
    from tokenizer import autoencoder  # type: ignore[import-not-found]

    autoencoder.Encoder = partial(autoencoder.Encoder, ch=WIDTH)
    autoencoder.Decoder = partial(autoencoder.Decoder, ch=WIDTH)
    goldens, layouts = {}, {}
    for kind in ("vavae", "marvae"):
        network = autoencoder.AutoencoderKL(CHANNELS, (1, 1, 2, 2, 4), model_type=kind).eval()
        layout = {name: tuple(each.shape) for name, each in network.state_dict().items()}
        network.load_state_dict(weights(layout))
        with torch.no_grad():
            posterior = network.encode(images().float() / 127.5 - 1)
            decoded = network.decode(posterior.mean)
        goldens |= {f"{kind}.mean": posterior.mean, f"{kind}.std": posterior.std}
        goldens[f"{kind}.decoded"] = decoded
        layouts[kind] = layout
    save_file(
        {name: each.contiguous() for name, each in goldens.items()},
        GOLDENS,
        metadata={"layouts": json.dumps(layouts)},
    )


if __name__ == "__main__":
    main()
