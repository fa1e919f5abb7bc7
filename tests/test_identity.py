"""Identities stay what they are when code moves and classes gain options."""

from __future__ import annotations

import inspect
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sag_dit.checkpoints import build, describe
from sag_dit.cli import run_identity
from sag_dit.cli.app import config_folder
from sag_dit.cli.jobs import Protocol
from sag_dit.cli.records import FIRST_METRICS, Record, identity_of
from sag_dit.cli.sample import Pixels
from sag_dit.data.digits import Digits
from sag_dit.data.images import ImageFolderData
from sag_dit.data.latents import LatentData
from sag_dit.data.patches import Patches
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SAG, Term
from sag_dit.identity import LATER, Name, agree, digest, hashed, later, name_of, settings, written
from sag_dit.models import DiT
from sag_dit.models.classifier import Classifier
from sag_dit.models.unet import UNet
from sag_dit.output.claim import CONFIG, claim
from sag_dit.process import Process
from sag_dit.sampler import DDIM, EulerFlow, Sampler
from sag_dit.sampler.diffusers import DiffusersSampler
from sag_dit.training.objective import Objective

OPTIONS = Path(__file__).with_name("identities.json")


def subclasses(base: type) -> Iterator[type]:
    """Every class of the package below one."""
    for each in base.__subclasses__():
        if each.__module__.startswith("sag_dit."):
            yield each
        yield from subclasses(each)


FAMILIES: dict[str, list[type]] = {
    "guidance": list(subclasses(Term)),
    "sampler": list(subclasses(Sampler)),
    "objective": list(subclasses(Objective)),
    "process": [each for each in subclasses(Process) if each.__name__ != "StridedDDPM"],
    "denoiser": [ClassConditional],
    "network": [DiT, UNet, Classifier],
    "data": [Digits, ImageFolderData, LatentData, Patches],
    "command": [Pixels, Protocol],
}


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


@pytest.mark.parametrize("family", ["guidance", "sampler", "objective", "data", "network"])
def test_what_a_run_is_made_of_has_a_key_of_its_own(family: str) -> None:
    made = [each for each in FAMILIES[family] if not inspect.isabstract(each)]
    # This one is called what its scheduler is called, by its own field.
    keys = [name_of(each) for each in made if each is not DiffusersSampler]
    assert all("." not in key for key in keys), keys
    assert len(set(keys)) == len(keys)
    former = [name for key in keys for name in key.former]
    assert len(set(former)) == len(former)


@contextmanager
def moved(*kinds: type) -> Iterator[None]:
    """Classes as if they lay in another module, under another name."""
    places = [(kind, kind.__module__, kind.__name__, kind.__qualname__) for kind in kinds]
    for kind in kinds:
        kind.__module__ = "sag_dit.elsewhere"
        kind.__name__ = kind.__qualname__ = "Renamed"
    try:
        yield
    finally:
        for kind, module, name, qualname in places:
            kind.__module__, kind.__name__, kind.__qualname__ = module, name, qualname


MOVABLE = [
    each
    for family in ("guidance", "sampler", "objective", "denoiser", "network", "data")
    for each in FAMILIES[family]
    if not inspect.isabstract(each) and each is not DiffusersSampler
]


@pytest.mark.parametrize("kind", MOVABLE)
def test_moving_and_renaming_a_class_changes_no_name(kind: type) -> None:
    before = name_of(kind)
    with moved(kind):
        after = name_of(kind)
    assert (after, after.former) == (before, before.former)


def test_a_moved_method_and_sampler_keep_hash_and_folder(
    denoiser: ClassConditional, tmp_path: Path
) -> None:
    def identity() -> dict[str, Any]:
        return {"guidance": SAG(1.0).identity(denoiser), "sampler": DDIM().identity()}

    before = identity()
    assert before["guidance"]["term"] == "sag" and before["sampler"]["name"] == "ddim"
    assert hashed(before)["guidance"]["term"] == "sag_dit.guidance.sag.SAG"
    assert hashed(before)["sampler"]["name"] == "DDIM"
    claim(tmp_path, before, {}, "images")
    with moved(SAG, DDIM):
        assert digest(identity()) == digest(before)
        claim(tmp_path, identity(), {}, "images")


def test_a_subclass_is_another_method(denoiser: ClassConditional) -> None:
    class Mine(SAG):
        pass

    assert (
        Mine(1.0).identity(denoiser)["term"].endswith("a_subclass_is_another_method.<locals>.Mine")
    )
    assert not agree(SAG(1.0).identity(denoiser), Mine(1.0).identity(denoiser))

    class Solver(EulerFlow):
        pass

    assert Solver().identity()["name"] == "Solver"


def test_a_field_that_is_called_key_is_no_key(denoiser: ClassConditional) -> None:
    @dataclass(frozen=True)
    class Keyed(PAG):
        _: KW_ONLY
        key: str = "sag"  # type: ignore[misc]

    identity = Keyed(1.0).identity(denoiser)
    assert identity["term"].endswith("Keyed") and identity["key"] == "sag"


@dataclass(frozen=True)
class GrownCFG(CFG):
    """What CFG may once be."""

    key = CFG.key
    former = CFG.former

    _: KW_ONLY
    phase: float = field(default=0.0, metadata=LATER)
    parts: tuple[int, ...] = field(default_factory=lambda: (1, 2), metadata=LATER)


@dataclass(frozen=True)
class GrownDDIM(DDIM):
    """What DDIM may once be."""

    key = DDIM.key
    former = DDIM.former

    churn: float = field(default=0.0, metadata=LATER)


def test_an_option_of_a_method_tells_of_itself_where_it_is_not_at_its_default(
    denoiser: ClassConditional,
) -> None:
    first = CFG(2.0).identity(denoiser)
    assert GrownCFG(2.0).identity(denoiser) == first
    assert GrownCFG(2.0, parts=(1, 2)).identity(denoiser) == first
    for grown in (GrownCFG(2.0, phase=0.1), GrownCFG(2.0, parts=(2,))):
        assert digest(grown.identity(denoiser)) != digest(first)
    assert GrownDDIM().identity() == DDIM().identity()
    assert GrownDDIM(churn=0.1).identity() == {"name": "ddim", "eta": 0.0, "churn": 0.1}


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


# --- names ----------------------------------------------------------------------------------------


def test_names_are_written_as_keys_and_hashed_as_they_were() -> None:
    identity = {
        "a": [Name("sag", ("old.SAG", "older.SAG"))],
        "b": {"c": Name("new")},
        "d": math.inf,
    }
    assert written(identity) == {"a": ["sag"], "b": {"c": "new"}, "d": math.inf}
    assert all(type(each) is str for each in (*written(identity)["a"], *hashed(identity)["a"]))
    assert hashed(identity) == {"a": ["old.SAG"], "b": {"c": "new"}, "d": math.inf}
    assert yaml.safe_load(yaml.safe_dump(written(identity))) == written(identity)
    again = pickle.loads(pickle.dumps(identity))
    assert hashed(again) == hashed(identity)
    for before in ("sag", "old.SAG", "older.SAG"):
        assert agree({"a": [before], "b": {"c": "new"}, "d": math.inf}, identity)
    for before in ("seg", "SAG", None):
        assert not agree({"a": [before], "b": {"c": "new"}, "d": math.inf}, identity)
    assert not agree({"a": ["sag"], "b": {}, "d": math.inf}, identity)
    assert not agree({"a": ["sag", "sag"], "b": {"c": "new"}, "d": math.inf}, identity)


def test_a_folder_of_another_method_is_still_refused(
    tmp_path: Path, denoiser: ClassConditional
) -> None:
    (tmp_path / CONFIG).write_text("settings: {guidance: {term: sag_dit.guidance.pag.PAG}}\n")
    with pytest.raises(ValueError, match=r"guidance.term: there sag_dit.guidance.pag.PAG, now sag"):
        claim(tmp_path, {"guidance": SAG(1.0).identity(denoiser)}, {}, "images")


def falling(progress: float, power: float) -> float:
    return float(1 - progress**power)


def test_functions_and_modules_are_called_by_where_they_are(denoiser: ClassConditional) -> None:
    term = replace(CFG(2.0), schedule=partial(falling, power=2.0))
    assert term.identity(denoiser)["schedule"] == [
        f"{falling.__module__}.falling",
        [],
        {"power": 2.0},
    ]
    assert name_of(math.sin) == "math.sin"


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", ["experiment=digits"])


def test_a_key_of_training_is_left_out_of_the_identity_at_its_default(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_identity.identity(config)
    folder = run_identity.run_folder(config)
    monkeypatch.setattr(run_identity, "LATER_KEYS", {"ema.warmup": 0, "lora.dora": False})
    monkeypatch.setattr(Digits, "later", {"invert": False}, raising=False)
    for arguments, same in (
        ({"ema": {"warmup": 0}}, True),
        ({"ema": {"warmup": 10}}, False),
        ({"data": {"invert": False}}, True),
        ({"data": {"invert": True}}, False),
        ({"lora": None}, False),  # not a key that came later
    ):
        grown = config.copy()
        with_more(grown, arguments)
        assert (run_identity.identity(grown) == before) == same, arguments
        assert (run_identity.run_folder(grown) == folder) == same, arguments


def with_more(config: DictConfig, more: dict[str, Any]) -> None:
    from omegaconf import open_dict

    with open_dict(config):
        config.merge_with(more)


def test_classes_of_a_run_are_known_by_their_keys(config: DictConfig) -> None:
    identity = run_identity.identity(config)
    assert (identity["data"]["_target_"], identity["objective"]["_target_"]) == ("digits", "mse")
    assert identity["trainer"]["_target_"] == "lightning.pytorch.Trainer"
    was = hashed(identity)
    assert was["data"]["_target_"] == "sag_dit.data.digits.Digits"
    assert was["objective"]["_target_"] == "sag_dit.training.objective.MSE"
    changed = config.copy()
    changed.objective._target_ = "sag_dit.training.objective.squared_error.MSE"
    assert hashed(run_identity.identity(changed))["objective"] == changed.objective
    assert agree(was, run_identity.identity(changed))
    changed.objective._target_ = "no.such.Objective"
    assert run_identity.identity(changed)["objective"]["_target_"] == "no.such.Objective"


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
