"""Identities name classes by their keys, so that they stay what they are when code moves."""

from __future__ import annotations

import inspect
import math
import pickle
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from sag_dit.cli import run_identity
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SAG
from sag_dit.identity import Name, agree, digest, hashed, name_of, written
from sag_dit.output.claim import CONFIG, claim
from sag_dit.sampler import DDIM, EulerFlow
from sag_dit.sampler.diffusers import DiffusersSampler
from tests.identity.families import FAMILIES, MOVABLE, moved


@pytest.mark.parametrize("family", ["guidance", "sampler", "objective", "data", "network"])
def test_what_a_run_is_made_of_has_a_key_of_its_own(family: str) -> None:
    made = [each for each in FAMILIES[family] if not inspect.isabstract(each)]
    # This one is called what its scheduler is called, by its own field.
    keys = [name_of(each) for each in made if each is not DiffusersSampler]
    assert all("." not in key for key in keys), keys
    assert len(set(keys)) == len(keys)
    former = [name for key in keys for name in key.former]
    assert len(set(former)) == len(former)


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

    assert Solver().identity()["name"].endswith("a_subclass_is_another_method.<locals>.Solver")


@pytest.mark.parametrize(("name", "value"), [("key", "sag"), ("former", SAG.former)])
def test_a_copy_has_to_be_called_something_else(
    denoiser: ClassConditional, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """Or else the images of the original would stand for those of the copy."""

    class Copy(SAG):
        pass

    monkeypatch.setattr(Copy, "key", "mine", raising=False)
    monkeypatch.setattr(Copy, "former", ("before.Copy",), raising=False)
    assert Copy(1.0).identity(denoiser)["term"] == "mine"
    with monkeypatch.context() as changed:
        changed.setattr(Copy, name, value)
        with pytest.raises(ValueError, match=r"Copy and sag_dit.guidance.sag.SAG are both called"):
            Copy(1.0).identity(denoiser)
        # A notebook makes a class anew, in the same module and under the same name.
        Copy.__module__, Copy.__qualname__ = SAG.__module__, SAG.__qualname__
        Copy(1.0).identity(denoiser)


def test_a_field_that_is_called_key_is_no_key(denoiser: ClassConditional) -> None:
    @dataclass(frozen=True)
    class Keyed(PAG):
        _: KW_ONLY
        key: str = "sag"  # type: ignore[misc]

    identity = Keyed(1.0).identity(denoiser)
    assert identity["term"].endswith("Keyed") and identity["key"] == "sag"


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
