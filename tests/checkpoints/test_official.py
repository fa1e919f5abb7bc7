"""Official .pt files, safetensors, and what is read from weights alone."""

from __future__ import annotations

import hashlib
import json
import logging
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sag_dit.checkpoints import build, describe, load, write_safetensors
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.models import SIZES, DiT
from sag_dit.models.dit.adapter import grid_of, head_count
from sag_dit.process import DDPM, Flow, Process
from tests.checkpoints.conftest import Same
from tests.conftest import MakeDiT


def test_flat_file_gives_the_published_model(flat: Path, pixel_dit: DiT, same: Same) -> None:
    model = load(flat)
    assert same(model.denoiser.network, pixel_dit)
    assert model.name == "small"
    assert model.sha256 == hashlib.sha256(flat.read_bytes()).hexdigest()
    assert isinstance(model.codec, IdentityCodec)
    assert model.denoiser.x_0_range == (-1, 1)
    assert model.denoiser.kind == "eps"
    assert model.denoiser.process == DDPM("linear", 1000)
    assert model.denoiser.null(2) is not None
    assert not model.denoiser.training
    assert model.batch_size == 16
    json.dumps(model.config)


def test_loaded_weights_are_memory_of_their_own(flat: Path, pixel_dit: DiT, same: Same) -> None:
    model = load(flat)
    network = model.denoiser.network
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    assert not network.pos_embed.requires_grad and network.x_embedder.proj.weight.requires_grad
    flat.write_bytes(b"\0" * flat.stat().st_size)
    assert same(network, pixel_dit)


def test_file_of_the_old_serialization_is_read(pixel_dit: DiT, tmp_path: Path, same: Same) -> None:
    path = tmp_path / "old.pt"
    torch.save(pixel_dit.state_dict(), path, _use_new_zipfile_serialization=False)
    assert same(load(path).denoiser.network, pixel_dit)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off(pixel_dit: DiT, tmp_path: Path, same: Same, prefix: str) -> None:
    path = tmp_path / "wrapped.pt"
    torch.save({prefix + name: value for name, value in pixel_dit.state_dict().items()}, path)
    assert same(load(path).denoiser.network, pixel_dit)


def test_training_file_holds_both_sets(
    training: Path, pixel_dit: DiT, ema_dit: DiT, same: Same
) -> None:
    averaged, raw = load(training), load(training, ema=False)
    assert same(averaged.denoiser.network, ema_dit)
    assert same(raw.denoiser.network, pixel_dit)
    assert averaged.sha256 == raw.sha256 and averaged.config != raw.config


def test_args_tell_size_and_classes(
    make_dit: MakeDiT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = make_dit(in_channels=3, hidden_size=384, num_heads=6, depth=1, class_dropout_prob=0.0)
    args = Namespace(model="DiT-S/2", num_classes=10)
    torch.save({"ema": network.state_dict(), "args": args}, tmp_path / "told.pt")
    model = load(tmp_path / "told.pt")
    assert model.config["model"]["num_heads"] == 6
    assert model.denoiser.num_classes == 10 and model.denoiser.null(1) is None
    assert caplog.records == []


def test_extension_does_not_matter(flat: Path, pixel_dit: DiT, same: Same) -> None:
    renamed = flat.rename(flat.with_name("weights.safetensors"))
    assert same(load(renamed).denoiser.network, pixel_dit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(
    pixel_dit: DiT, tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {name: value.to(dtype) for name, value in pixel_dit.state_dict().items()}
    torch.save(state, tmp_path / "cast.pt")
    loaded = load(tmp_path / "cast.pt").denoiser.network.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())
    assert {value.dtype for value in loaded.values()} == {torch.float32}


def test_bare_safetensors_are_read_like_a_flat_file(
    pixel_dit: DiT, tmp_path: Path, same: Same
) -> None:
    save_file(pixel_dit.state_dict(), tmp_path / "bare.safetensors")
    assert same(load(tmp_path / "bare.safetensors").denoiser.network, pixel_dit)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": (8, 12)},
        {"input_size": (12, 8)},
        {"input_size": (4, 16)},
        {"in_channels": 1},
        {"patch_size": 1, "input_size": 4},
        {"mlp_ratio": 2.3},
        {"hidden_size": 104, "mlp_ratio": 60.5 / 104, "num_heads": 13},
        {"learn_sigma": False},
        {"num_classes": 1},
        {"depth": 12},
    ],
    ids=str,
)
def test_size_is_read_from_the_weights(
    make_dit: MakeDiT, tmp_path: Path, same: Same, options: dict[str, object]
) -> None:
    network = make_dit(**{"in_channels": 3, "hidden_size": 64, "num_heads": 1, **options})
    torch.save(network.state_dict(), tmp_path / "sized.pt")
    model = load(tmp_path / "sized.pt")
    assert describe(model.denoiser)["model"] == describe(ClassConditional(network, DDPM()))["model"]
    if network.num_classes == 10:
        assert same(model.denoiser.network, network)


def test_unconditional_model_without_null_row(make_dit: MakeDiT, tmp_path: Path) -> None:
    network = make_dit(in_channels=1, num_classes=1, class_dropout_prob=0.0)
    torch.save(network.state_dict(), tmp_path / "one.pt")
    model = load(tmp_path / "one.pt")
    assert model.denoiser.num_classes == 1 and model.denoiser.null(1) is None


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_their_heads(name: str, caplog: pytest.LogCaptureFixture) -> None:
    size = SIZES[name]
    heads = head_count(size["hidden_size"], size["depth"], Path("x.pt"))
    assert heads == size["num_heads"] and caplog.records == []


@pytest.mark.parametrize(
    ("hidden", "heads"), [(1152, 16), (384, 6), (128, 2), (144, 2), (96, 3), (48, 3), (40, 5)]
)
def test_assumed_heads_are_told(hidden: int, heads: int, caplog: pytest.LogCaptureFixture) -> None:
    assert head_count(hidden, 3, Path("odd.pt")) == heads
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{heads} of width" in record.message and "odd.json" in record.message


def test_heads_that_cannot_be_assumed_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r'width 36 suggests none.*"num_heads": N.*odd\.json'):
        head_count(36, 3, Path("odd.pt"))


def test_heads_can_be_given(make_dit: MakeDiT, tmp_path: Path, same: Same) -> None:
    network = make_dit(in_channels=3)
    path = tmp_path / "four.pt"
    torch.save(network.state_dict(), path)
    assert not same(load(path).denoiser.network, network)
    assert same(load(path, num_heads=4).denoiser.network, network)
    path.with_suffix(".json").write_text(
        '{"model": {"num_heads": 4}, "process": {"schedule": "cosine"}, "kind": "v"}'
    )
    told = load(path)
    assert same(told.denoiser.network, network)
    assert told.denoiser.process == DDPM("cosine", 1000) and told.denoiser.kind == "v"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_flat_config_of_the_hubs_mixin_tells_the_heads(
    make_dit: MakeDiT, tmp_path: Path, same: Same, name: str, whole: bool
) -> None:
    network, path = make_dit(in_channels=3), tmp_path / name
    save_file(network.state_dict(), path) if "safe" in name else torch.save(
        network.state_dict(), path
    )
    flat = {"num_heads": 4, "hidden_size": 48, "depth": 3, "qk_norm": False, "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert same(load(tmp_path if whole else path).denoiser.network, network)
    # Of another width, it is about something else.
    (tmp_path / "config.json").write_text(json.dumps({**flat, "hidden_size": 768}))
    assert not same(load(tmp_path if whole else path).denoiser.network, network)


def test_stated_flow_is_of_kind_v(flat: Path) -> None:
    flat.with_suffix(".json").write_text('{"model": {}, "process": {"time_scale": 1000}}')
    model = load(flat)
    assert model.denoiser.process == Flow(time_scale=1000) and model.denoiser.kind == "v"


def test_config_of_something_else_beside_the_file_is_left_alone(
    flat: Path, pixel_dit: DiT, same: Same
) -> None:
    flat.with_name("config.json").write_text('{"model": "resnet", "num_heads": 3}')
    assert same(load(flat).denoiser.network, pixel_dit)


def test_positions_of_no_rectangle(caplog: pytest.LogCaptureFixture) -> None:
    learned = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    assert grid_of(learned, Path("learned.pt")) == (4, 4)
    assert "square of 4 x 4" in caplog.text
    with pytest.raises(ValueError, match=r"12 positions.*input_size"):
        grid_of(learned[:12], Path("learned.pt"))


def test_own_export_comes_back_whole(make_dit: MakeDiT, tmp_path: Path, same: Same) -> None:
    network = make_dit(in_channels=1, input_size=(8, 4), num_classes=10)
    names = [f"digit {i}" for i in range(10)]
    denoiser = ClassConditional(
        network, DDPM("cosine", 500), kind="v", x_0_range=(-1, 1), class_names=names
    )
    extra = {"defaults": {"batch_size": 64}}
    path = write_safetensors(tmp_path / "export", denoiser, extra)
    alone = path.rename(tmp_path / "alone.safetensors")
    for source, name in (
        (write_safetensors(tmp_path / "export", denoiser, extra).parent, "export"),
        (tmp_path / "export" / "model.safetensors", "export"),
        (alone, "alone"),
    ):
        model = load(source)
        assert same(model.denoiser.network, network)
        assert model.name == name
        assert model.class_names == tuple(names)
        assert model.batch_size == 64
        assert model.description == {**describe(denoiser), **extra}
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("process", [DDPM("cosine", 40), Flow(time_scale=1000.0, shift=3.0)])
def test_description_rebuilds_a_denoiser(wide_dit: DiT, process: Process) -> None:
    config = describe(ClassConditional(wide_dit, process, kind="v"))
    again = build(json.loads(json.dumps(config)))
    assert describe(again) == config and again.process == process
    again.network.load_state_dict(wide_dit.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "flow"}, "kind='flow': expected one of"),
        ({"process": {"schedule": "linear", "shift": 1.0}}, "expected a mapping with schedule, .*"),
        ({"process": "ddpm"}, "process='ddpm': expected a mapping with schedule"),
        ({"process": {"schedule": "loud", "num_timesteps": 9}}, "schedule='loud'"),
        ({"model": {"widht": 3}}, "model: missing input_size.*unknown widht"),
        ({"model": 3}, "model: expected a mapping, found a int"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(
    denoiser: ClassConditional, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build({**describe(denoiser), **change})


def test_missing_parts_of_a_config_are_named() -> None:
    with pytest.raises(ValueError, match="the config: missing model, kind, x_0_range"):
        build({"process": {}})


def test_small_published_size_needs_no_telling(
    make_dit: MakeDiT, tmp_path: Path, same: Same, caplog: pytest.LogCaptureFixture
) -> None:
    network = make_dit(in_channels=3, **SIZES["DiT-S/4"])
    torch.save(network.state_dict(), tmp_path / "DiT-S-4.pt")
    model = load(tmp_path / "DiT-S-4.pt")
    assert same(model.denoiser.network, network)
    assert model.name == "DiT-S-4" and "number of attention heads" not in caplog.text


def guesses(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What loading has said it guesses, and forget it."""
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return said


def test_every_guess_is_told_once_and_its_remedy_ends_it(
    flat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(flat)
    said = guesses(caplog)
    assert len(said) == 3 and all("small.json beside it" in line for line in said)
    for told in ("eps on DDPM's linear betas", "last is taken for the null", "number of attention"):
        assert sum(told in line for line in said) == 1
    stated = {"model": {"num_heads": 2, "num_classes": 11}, "process": {"schedule": "cosine"}}
    flat.with_suffix(".json").write_text(json.dumps(stated))
    model = load(flat)
    assert guesses(caplog) == []
    assert model.denoiser.process == DDPM("cosine") and model.denoiser.null(1) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_quantised_weights_are_refused(pixel_dit: DiT, tmp_path: Path, dtype: torch.dtype) -> None:
    state = pixel_dit.state_dict()
    state["blocks.1.mlp.fc1.weight"] = torch.ones_like(state["blocks.1.mlp.fc1.weight"]).to(dtype)
    torch.save(state, tmp_path / "quantised.pt")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"blocks\.1\.mlp\.fc1\.weight is {name}, as quantised"):
        load(tmp_path / "quantised.pt")
