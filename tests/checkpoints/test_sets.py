"""A network is found wherever a trainer keeps it, and its average is never mistaken for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sag_dit.checkpoints import load
from sag_dit.models import DiT
from tests.checkpoints.conftest import Same

State = dict[str, Tensor]


def below(prefix: str, state: State) -> State:
    """Put a prefix before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def in_blocks(wrapper: str) -> Callable[[State], State]:
    """Wrap a module around every block and around every attention layer."""

    def wrap(state: State) -> State:
        return {
            name.replace(".attn.", f".{wrapper}.attn.{wrapper}."): tensor
            for name, tensor in state.items()
        }

    return wrap


WRAPPED: dict[str, Callable[[State], State]] = {
    "compiled blocks": in_blocks("_orig_mod"),
    "checkpointed blocks": in_blocks("_checkpoint_wrapped_module"),
    "fsdp": lambda s: below("_fsdp_wrapped_module.", in_blocks("_fsdp_wrapped_module")(s)),
    "model": lambda s: below("model.", s),
    "net": lambda s: below("net.", s),
    "compiled in ddp": lambda s: below("module._orig_mod.model.", s),
    "a name of one's own": lambda s: below("velocity_field.backbone.", s),
    "beside other networks": lambda s: {**below("dit.", s), "vae.conv.weight": torch.ones(3)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_wrappers_are_taken_off_wherever_they_stand(
    pixel_dit: DiT, tmp_path: Path, same: Same, wrap: Callable[[State], State], kind: str
) -> None:
    path, state = tmp_path / f"wrapped.{kind}", wrap(pixel_dit.state_dict())
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    assert same(load(path).denoiser.network, pixel_dit)


def shadow(state: State) -> State:
    """An average as latent-diffusion's LitEma keeps it: trained weights, names without dots."""
    trained = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    dotless = {f"net{name}".replace(".", ""): tensor for name, tensor in trained.items()}
    return below("model_ema.", dotless) | {"model_ema.decay": torch.tensor(0.9999)}


Both = Callable[[State, State], dict[str, Any]]
BOTH: dict[str, Both] = {
    "model_ema": lambda raw, ema: {"model": raw, "model_ema": ema},
    "ema first": lambda raw, ema: {"ema_model": ema, "net": raw, "opt": {"state": {}}},
    "state_dict_ema": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "epoch": 3},
    "ema_state_dict": lambda raw, ema: {"model_state_dict": raw, "ema_state_dict": ema},
    "ema_net": lambda raw, ema: {"net": raw, "ema_net": below("module.", ema)},
    "modelEMA": lambda raw, ema: {"model": raw, "modelEMA": ema},
    "a callback's": lambda raw, ema: {
        "state_dict": below("model.", raw),
        "callbacks": {"EMACallback": {"ema_weights": below("model.", ema)}},
    },
    "an object's": lambda raw, ema: {"model": raw, "ema": {"decay": 0.99, "shadow": ema}},
    "prefixes": lambda raw, ema: {
        **below("online_model.", raw),
        **below("ema_model.", ema),
        "initted": torch.tensor(True),
    },
    "a module beside": lambda raw, ema: {
        "state_dict": {**below("net.", raw), **below("net_ema.module.", ema)}
    },
    "without what is not trained": lambda raw, ema: {
        "model": raw,
        "ema": {name: tensor for name, tensor in ema.items() if name != "pos_embed"},
    },
    "without dots": lambda raw, ema: {"state_dict": below("model.net.", raw) | shadow(ema)},
}


@pytest.mark.parametrize("pack", BOTH.values(), ids=BOTH)
def test_averages_are_known_by_their_usual_names(
    pixel_dit: DiT, ema_dit: DiT, tmp_path: Path, same: Same, pack: Both
) -> None:
    path = tmp_path / "both.pt"
    torch.save(pack(pixel_dit.state_dict(), ema_dit.state_dict()), path)
    assert same(load(path).denoiser.network, ema_dit)
    assert same(load(path, ema=False).denoiser.network, pixel_dit)


@pytest.mark.parametrize("place", ["optimizer", "opt_state", "optimiser_states"])
def test_an_optimisers_averages_are_no_weights(
    pixel_dit: DiT, ema_dit: DiT, tmp_path: Path, same: Same, place: str
) -> None:
    moments = {name: ema_dit.state_dict() for name in ("exp_avg", "exp_avg_sq")}
    torch.save({place: moments, "model": pixel_dit.state_dict()}, tmp_path / "a.pt")
    assert same(load(tmp_path / "a.pt", ema=False).denoiser.network, pixel_dit)
    with pytest.raises(ValueError, match=r"holds no averaged \(EMA\) weights; use ema=false"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("key", ["net", "state_dict", "model_state_dict"])
def test_raw_weights_alone_are_no_average(pixel_dit: DiT, tmp_path: Path, key: str) -> None:
    torch.save({key: pixel_dit.state_dict(), "epoch": 2}, tmp_path / "raw.pt")
    with pytest.raises(ValueError, match=r"holds no averaged \(EMA\) weights; use ema=false"):
        load(tmp_path / "raw.pt")
    assert load(tmp_path / "raw.pt", ema=False).config["weights"] == "raw"


def test_an_average_alone_is_not_raw(pixel_dit: DiT, tmp_path: Path) -> None:
    torch.save(below("ema_model.", pixel_dit.state_dict()), tmp_path / "average.pt")
    with pytest.raises(ValueError, match="holds no raw weights; use ema=true"):
        load(tmp_path / "average.pt", ema=False)


@pytest.mark.parametrize(
    "average",
    [
        {"decay": 0.99, "shadow_params": [torch.ones(2, 2)]},
        {"0": torch.ones(2, 2), "1": torch.ones(2)},
    ],
    ids=["a list", "numbered"],
)
def test_an_average_without_names_is_not_passed_over(
    pixel_dit: DiT, tmp_path: Path, average: dict[str, Any]
) -> None:
    torch.save({"model": pixel_dit.state_dict(), "model_ema": average}, tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"its averaged weights, model_ema.* are not read") as told:
        load(tmp_path / "list.pt")
    assert "ema=false" not in str(told.value)
    assert load(tmp_path / "list.pt", ema=False).config["weights"] == "raw"


def test_of_several_averages_the_first_is_taken_and_told(
    pixel_dit: DiT, ema_dit: DiT, tmp_path: Path, same: Same, caplog: pytest.LogCaptureFixture
) -> None:
    averages = {"ema_0.9999": ema_dit.state_dict(), "ema_0.99": pixel_dit.state_dict()}
    torch.save({"model": pixel_dit.state_dict(), **averages}, tmp_path / "many.pt")
    with caplog.at_level(logging.WARNING):
        assert same(load(tmp_path / "many.pt").denoiser.network, ema_dit)
    assert "of the weights in ema_0.9999, ema_0.99 the first are taken" in caplog.text


def test_names_of_many_parts_are_no_burden(pixel_dit: DiT, tmp_path: Path) -> None:
    state = {**pixel_dit.state_dict(), "a." * 50_000: torch.ones(2, 2)}
    torch.save(below("net.", state), tmp_path / "deep.pt")
    with pytest.raises(ValueError, match="1 unexpected"):
        load(tmp_path / "deep.pt")
