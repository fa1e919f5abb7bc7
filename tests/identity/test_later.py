"""What classes, configurations and metrics gain later is left out of identities at its default."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, open_dict

from sag_dit.checkpoints import build, describe
from sag_dit.cli import run_identity
from sag_dit.data.digits import Digits
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG
from sag_dit.identity import LATER, later, name_of, settings, written
from sag_dit.models import DiT
from sag_dit.sampler import DDIM
from sag_dit.sampling import Pixels
from sag_dit.study.measurement import Protocol
from sag_dit.study.results import FIRST_METRICS, Record, identity_of
from tests.identity.families import FAMILIES

OPTIONS = Path(__file__).with_name("identities.json")


def options(thing: type) -> list[str]:
    """What a class takes, without what came later."""
    return [name for name in inspect.signature(thing).parameters if name not in later(thing)]


def told() -> dict[str, dict[str, Any]]:
    """The options of everything that an identity tells, by family and name."""
    return {
        family: {
            str(name_of(each, otherwise=each.__name__)): {
                "options": options(each),
                "later": later(each),
            }
            for each in classes
            if not inspect.isabstract(each)
        }
        for family, classes in FAMILIES.items()
    }


def test_an_option_that_is_added_is_marked_as_later() -> None:
    """Otherwise every run that was made without it loses its folder.

    identities.json holds what identities told first. A new class is added to it with its options;
    what is added to a class that stands there is ``LATER``, and its default never changes.
    """
    known = json.loads(OPTIONS.read_text())
    now = written(told())
    for family, classes in now.items():
        assert classes.keys() == known[family].keys(), family
        for name, found in classes.items():
            assert sorted(found["options"]) == sorted(known[family][name]["options"]), name
            for option, default in known[family][name]["later"].items():
                assert found["later"][option] == default, f"{name}.{option}"


@pytest.fixture
def come_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], None]:
    """Mark a field as if runs had been made without it."""

    def mark(kind: type, name: str) -> None:
        (found,) = (each for each in fields(kind) if each.name == name)  # type: ignore[arg-type]
        monkeypatch.setattr(found, "metadata", LATER)

    return mark


def test_an_option_of_a_method_is_told_where_it_is_not_at_its_default(
    denoiser: ClassConditional, come_later: Callable[[type, str], None]
) -> None:
    before, solver = CFG(2.0).identity(denoiser), DDIM().identity()
    come_later(CFG, "channels")
    come_later(CFG, "interval")
    come_later(DDIM, "eta")
    after = CFG(2.0).identity(denoiser)
    assert before == after | {"channels": None, "interval": [0.0, 1.0]}
    assert CFG(2.0, channels=3).identity(denoiser) == after | {"channels": 3}
    assert CFG(2.0, interval=(0.1, 1.0)).identity(denoiser) == after | {"interval": [0.1, 1.0]}
    assert DDIM().identity() == {"name": "ddim"}
    assert DDIM(eta=0.5).identity() == solver | {"eta": 0.5}


def test_an_option_whose_default_is_made_is_left_out_as_well() -> None:
    @dataclass(frozen=True)
    class Listed:
        parts: list[int] = field(default_factory=lambda: [1, 2], metadata=LATER)

    assert settings(Listed()) == settings(Listed([1, 2])) == {}
    assert settings(Listed([2])) == {"parts": [2]}


def test_what_is_added_to_pixels_or_to_a_protocol_is_left_out_at_its_default() -> None:
    @dataclass(frozen=True)
    class GrownPixels(Pixels):
        colours: str = field(default="sRGB", metadata=LATER)

    values: dict[str, Any] = dict.fromkeys(inspect.signature(Pixels).parameters, 1)
    assert settings(GrownPixels(**values)) == settings(Pixels(**values)) == values
    assert settings(GrownPixels(**values, colours="linear")) == values | {"colours": "linear"}

    @dataclass(frozen=True)
    class GrownProtocol(Protocol):
        subset: int = field(default=0, metadata=LATER)

    values = dict.fromkeys(inspect.signature(Protocol).parameters, 1)
    assert settings(GrownProtocol(**values)) == settings(Protocol(**values))


def test_an_argument_of_a_network_is_left_out_of_its_config_at_its_default(
    tiny_dit: DiT, denoiser: ClassConditional, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe(denoiser)
    monkeypatch.setattr(DiT, "later", {"class_dropout_prob": 0.1}, raising=False)
    after = describe(denoiser)
    assert before["model"] == after["model"] | {"class_dropout_prob": 0.1}
    assert describe(build(after)) == after
    tiny_dit.y_embedder.dropout_prob = 0.2
    assert describe(denoiser)["model"]["class_dropout_prob"] == 0.2


# --- training -------------------------------------------------------------------------------------


def test_a_key_of_training_is_left_out_of_the_identity_at_its_default(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_identity.identity(config)
    folder = run_identity.run_folder(config)
    came_later = {**run_identity.later_keys("train"), "ema.start": 0, "lora.dora": False}
    monkeypatch.setattr(run_identity, "later_keys", lambda command: came_later)
    monkeypatch.setattr(Digits, "later", {"invert": False}, raising=False)
    for arguments, same in (
        ({"ema": {"start": 0}}, True),
        ({"ema": {"start": 10}}, False),
        ({"data": {"invert": False}}, True),
        ({"data": {"invert": True}}, False),
        ({"lora": None}, False),  # not a key that came later
    ):
        grown = config.copy()
        with_more(grown, arguments)
        assert (run_identity.identity(grown) == before) == same, arguments
        assert (run_identity.run_folder(grown) == folder) == same, arguments


def with_more(config: DictConfig, more: dict[str, Any]) -> None:
    with open_dict(config):
        config.merge_with(more)


# --- metrics --------------------------------------------------------------------------------------


def test_a_metric_that_is_added_renames_no_record() -> None:
    for asked in (sorted(FIRST_METRICS), ["fid"], []):
        assert identity_of({"count": 3}, asked) == identity_of({"count": 3}, [*asked, "new"])
    assert identity_of({"count": 3}, ["fid"]) != identity_of({"count": 3}, ["is"])


def test_a_completed_record_keeps_what_was_measured() -> None:
    first = Record({"fid": 1.0}, {"fid": 0.1}, {"sag_dit": "1"}, ["few"], 2.0)
    further = Record({"fid": 9.0, "new": 2.0}, {"new": 0.2}, {"sag_dit": "2", "a": 1}, ["few"], 3.0)
    whole = first.completed(further)
    assert whole == Record(
        {"fid": 1.0, "new": 2.0}, {"fid": 0.1, "new": 0.2}, {"sag_dit": "1", "a": 1}, ["few"], 5.0
    )
    assert list(whole.of(["new", "fid"]).metrics) == ["new", "fid"]
    assert whole.of(["fid"]).spread == {"fid": 0.1}
