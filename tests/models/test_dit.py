"""DiT: its sizes, its keys, its grid, and what it refuses. Its numbers are held in tests/parity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sag_dit.models import SIZES, DiT, dit
from sag_dit.models.dit.network import LabelEmbedder, TimestepEmbedder, sincos_positions
from tests.closeness import assert_near
from tests.conftest import MakeDiT

PUBLISHED_MILLIONS = {"S": 33, "B": 130, "L": 458, "XL": 675}


def parameters_of(width: int, depth: int, patch: int, classes: int = 1000) -> int:
    """Trainable numbers of a DiT with 4 latent channels and learned variance, layer by layer."""

    def linear(a: int, b: int) -> int:
        return a * b + b

    block = linear(width, 3 * width) + linear(width, width) + linear(width, 6 * width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    embedders = linear(4 * patch**2, width) + linear(256, width) + linear(width, width)
    final = linear(width, 2 * width) + linear(width, 8 * patch**2)
    return depth * block + embedders + (classes + 1) * width + final


@pytest.mark.parametrize(("letter", "patch"), [*itertools.product(PUBLISHED_MILLIONS, (2, 4, 8))])
def test_parameter_counts_are_the_published_ones(letter: str, patch: int) -> None:
    with torch.device("meta"):
        network = dit(f"DiT-{letter}/{patch}", input_size=32)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    size = SIZES[f"DiT-{letter}/{patch}"]
    assert count == parameters_of(size["hidden_size"], size["depth"], patch)
    # Patch size moves the count by less than half a million, except through rounding.
    assert abs(count / 1e6 - PUBLISHED_MILLIONS[letter]) < 1.0
    assert network.grid == (32 // patch, 32 // patch)


def test_there_are_twelve_sizes_and_no_others() -> None:
    assert len(SIZES) == 12
    with pytest.raises(ValueError, match=r"size='DiT-XL/3'.*DiT-XL/2"):
        dit("DiT-XL/3")


def test_state_dict_keys_are_the_published_ones(make_dit: MakeDiT) -> None:
    block = [
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    ]
    expected = [
        "pos_embed",
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        *(f"blocks.0.{key}" for key in block),
        *(f"blocks.1.{key}" for key in block),
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    ]
    network = make_dit(depth=2)
    assert list(network.state_dict()) == expected
    assert network.state_dict()["pos_embed"].shape == (1, 16, 48)
    assert network.state_dict()["y_embedder.embedding_table.weight"].shape == (11, 48)
    assert not network.pos_embed.requires_grad


def test_a_fresh_network_is_the_identity_on_its_stream_and_says_zero() -> None:
    """adaLN-Zero: gates, modulation and output start at zero; everything else does not."""
    network = DiT(8, 2, 4, 48, 2, 4, num_classes=10)
    out = network(torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 10]))
    assert not out.any()
    zero = {name for name, p in network.named_parameters() if "weight" in name and not p.any()}
    assert zero == {
        "blocks.0.adaLN_modulation.1.weight",
        "blocks.1.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    }


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_channels_and_learned_variance(make_dit: MakeDiT, channels: int, learn_sigma: bool) -> None:
    network = make_dit(in_channels=channels, learn_sigma=learn_sigma)
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    out = network(x, torch.tensor([5, 5]), torch.tensor([1, 2]))
    assert out.shape == (2, channels * (2 if learn_sigma else 1), 8, 8)
    assert network.out_channels == out.shape[1]
    assert out.std() > 0.01


# --- geometry -------------------------------------------------------------------------------------


def by_patches(x: Tensor, size: int) -> Tensor:
    """Cut images into rows of patches, each written pixel by pixel, channels last."""
    rows = []
    for image in x:
        for top in range(0, x.shape[2], size):
            for left in range(0, x.shape[3], size):
                patch = image[:, top : top + size, left : left + size]
                rows.append(patch.permute(1, 2, 0).reshape(-1))
    return torch.stack(rows).reshape(x.shape[0], -1, size * size * x.shape[1])


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(8, 8, 2), (8, 12, 4), (12, 4, 2), (3, 5, 1)]
)
def test_unpatchify_is_the_inverse_of_cutting_patches(
    make_dit: MakeDiT, height: int, width: int, patch: int
) -> None:
    network = make_dit(input_size=(height, width), patch_size=patch, in_channels=3, depth=1)
    x = torch.randn(2, 6, height, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.unpatchify(by_patches(x, patch)), x)


def test_patch_embedding_reads_the_patches_that_unpatchify_lays_out(wide_dit: DiT) -> None:
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    weight = wide_dit.x_embedder.proj.weight.permute(0, 2, 3, 1).flatten(1)
    expected = by_patches(x, 2) @ weight.T + wide_dit.x_embedder.proj.bias
    assert_near(wide_dit.x_embedder(x), expected)


def test_without_attention_a_pixel_reaches_its_own_patch_only(make_dit: MakeDiT) -> None:
    """On a rectangular grid a swap of height and width would put it elsewhere."""
    network = make_dit(input_size=(8, 12), depth=0)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, :, 5, 8] += 1
    t, y = torch.tensor([5]), torch.tensor([1])
    where = (network(x, t, y) - network(changed, t, y)).abs().sum(dim=(0, 1)) > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4:6, 8:10] = True
    assert torch.equal(where, expected)


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_positions(grid: tuple[int, int]) -> None:
    """Row-major; the first half tells the column, the second the row; sines before cosines."""
    width = 16
    expected = []
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        features: list[float] = []
        for position in (column, row):
            angles = [position * 10000 ** (-i / (width / 4)) for i in range(width // 4)]
            features += [*map(math.sin, angles), *map(math.cos, angles)]
        expected.append(features)
    torch.testing.assert_close(sincos_positions(width, grid), torch.tensor(expected))


def test_grid_is_stored_as_height_and_width(wide_dit: DiT) -> None:
    assert wide_dit.grid == (4, 6) and wide_dit.input_size == (8, 12)
    x = torch.zeros(2, 4, 8, 12)
    assert wide_dit(x, torch.tensor([1, 2]), torch.tensor([1, 2])).shape == (2, 8, 8, 12)


# --- conditions -----------------------------------------------------------------------------------


def test_times_are_embedded_by_128_cosines_then_128_sines() -> None:
    t = torch.tensor([0.0, 1.0, 499.5, 999.0])
    features = TimestepEmbedder(8).sinusoids(t)
    expected = torch.tensor(
        [
            [
                wave(time * math.exp(-math.log(10000) * i / 128))
                for wave in (math.cos, math.sin)
                for i in range(128)
            ]
            for time in t.tolist()
        ]
    )
    # A frequency is rounded before it is multiplied by a time of up to 999.
    assert_near(features, expected, 1e-6, scale=t)


def test_rows_of_a_batch_do_not_meet(tiny_dit: DiT) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=random)
    t, y = torch.tensor([1, 500, 999]), torch.tensor([0, 5, 10])
    together = tiny_dit(x, t, y)
    for i in range(3):
        alone = tiny_dit(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert_near(together[i : i + 1], alone)


def test_class_and_time_matter(tiny_dit: DiT) -> None:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    out = tiny_dit(x, torch.tensor([5, 5, 6]), torch.tensor([1, 2, 1]))
    assert (out[0] - out[1]).abs().max() > 1e-2
    assert (out[0] - out[2]).abs().max() > 1e-4


def test_labels_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    embedder = LabelEmbedder(10, 8, dropout_prob=0.25)
    labels = torch.full((4000,), 3)
    null = embedder.embedding_table.weight[10]
    dropped = (embedder(labels) == null).all(dim=1).double().mean()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    kept = embedder.eval()(labels)
    assert torch.equal(kept, embedder.embedding_table.weight[3].expand(4000, 8))


def test_without_dropout_there_is_no_null_row() -> None:
    assert LabelEmbedder(10, 8, dropout_prob=0.0).embedding_table.num_embeddings == 10
    assert LabelEmbedder(10, 8, dropout_prob=0.1).embedding_table.num_embeddings == 11


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 9}, r"input_size=9: expected a multiple of patch_size=2"),
        ({"input_size": (8, 9)}, r"input_size=\(8, 9\): expected a multiple of patch_size=2"),
        ({"num_heads": 5}, r"num_heads=5: expected a divisor of hidden_size=48"),
        ({"hidden_size": 50, "num_heads": 5}, r"hidden_size=50: expected a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**{"hidden_size": 48, "num_heads": 4, "depth": 1, **options})  # type: ignore[arg-type]


def test_blocks_are_those_the_depth_asks_for(make_dit: MakeDiT) -> None:
    network = make_dit(depth=3)
    assert len(network.blocks) == 3
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([5]), torch.tensor([1])
    whole = network(x, t, y)
    for i in range(3):
        changed = make_dit(depth=3)
        changed.blocks[i].adaLN_modulation[-1].weight.data.zero_()
        changed.blocks[i].adaLN_modulation[-1].bias.data.zero_()
        assert (changed(x, t, y) - whole).abs().max() > 1e-3, f"block {i} does nothing"
