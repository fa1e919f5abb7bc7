"""What determines the weights of a training run, and the folder that is named after it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_origin

from sag_dit.bounds import Natural, parts, shown
from sag_dit.cli.keys import Train
from sag_dit.cli.keys.key import is_open, keys_of, mapping_of, selected, walk
from sag_dit.cli.schema import determining, later_keys
from sag_dit.files import atomic
from sag_dit.identity import Name, digest, name_of, plain, without_later
from sag_dit.messages import counted, some
from sag_dit.output import claim
from sag_dit.output.claim import short
from sag_dit.untrusted import read_json_as

ANY = object()
"""Stands for whatever value a key has."""


def identity(config: Mapping[str, Any], *, as_before: bool = False) -> dict[str, Any]:
    """Return what determines the weights of a run, given all its values.

    With ``as_before`` also the keys that were taken to do so once.
    """
    values = _copied(config)
    before = [path for path, _, told in walk(Train) if told.named_before] if as_before else []
    for key in determining("train", "nothing"):
        if key not in before:
            _drop(values, key)
    for key, value in later_keys("train").items():
        _drop(values, key, value)
    # A mapping where a list may stand means the list of it alone.
    for key in _alone_or_listed():
        if isinstance(selected(values, key), Mapping):
            _put(values, key, [selected(values, key)])
    named: dict[str, Any] = _with_names(plain(values))
    return named


@cache
def _alone_or_listed() -> tuple[str, ...]:
    """Return the keys that hold a list of mappings, or one that stands alone."""
    found = ((path, [get_origin(kind) for kind in parts(hint)]) for path, hint, _ in walk(Train))
    return tuple(path for path, kinds in found if list in kinds and dict in kinds)


def _put(values: Any, key: str, value: Any) -> None:
    group, _, name = key.rpartition(".")
    (selected(values, group) if group else values)[name] = value


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _copied(each) for name, each in value.items()}
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return [_copied(each) for each in value] if listed else value


def _drop(values: dict[str, Any], key: str, value: Any = ANY) -> None:
    """Take a key, its groups set apart by dots, out of values, if it has this value there."""
    *groups, name = key.split(".")
    for group in groups:
        values = values.get(group) or {}
    if name in values and (value is ANY or values[name] == value):
        del values[name]


def _with_names(value: Any) -> Any:
    """Return values with every ``_target_`` by its key, and without what it takes since later."""
    if isinstance(value, list):
        return [_with_names(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    values = {name: _with_names(each) for name, each in value.items()}
    target = values.get("_target_")
    if not isinstance(target, str):
        return values
    try:
        thing = resolve_name(target)
    except Exception:  # What cannot be imported is refused, with the reason, when it is made.
        return values
    name = name_of(thing, otherwise=target)
    # A class has several paths, of which the hash of this run may have had any.
    former = sorted(name.former, key=lambda path: path != target)
    return {**without_later(values, thing), "_target_": Name(name, former)}


def recorded_config(folder: Path) -> dict[str, Any]:
    """Return what a run's folder records, see :func:`sag_dit.output.claim.recorded`.

    Raises:
        ValueError: a group of keys is none there.
    """
    found = claim.recorded(folder)
    for name, value in found.get("config", {}).items():
        hint, told = keys_of(Train).get(name, (Any, None))
        grouped = told is not None and (is_open(hint) or mapping_of(hint, told))
        if grouped and not isinstance(value, (Mapping, type(None))):
            raise ValueError(
                f"{folder / claim.CONFIG}: config.{name}={value!r:.60}: expected a mapping; mend "
                f"it, or choose another out"
            )
    return found


def run_folder(config: Mapping[str, Any]) -> Path:
    """Return the run's folder: ``out``, or one named after what determines the weights.

    Runs had names before there were the keys that are ``unnamed``, so the name tells of one only
    where the name without it is taken by a run that differs in it. A run keeps the name that it
    has from when keys that are ``named_before`` stood in it, or a mapping that may stand in a list
    stood alone.
    """
    if config["out"]:
        return Path(config["out"])
    now = identity(config)
    wider = identity(config, as_before=True)
    names = [wider, now, _standing_alone(wider), _standing_alone(now)]
    folders = [_free_folder(config, _copied(values)) for values in names]
    return next((folder for folder in folders if folder.exists()), folders[names.index(now)])


def _standing_alone(values: dict[str, Any]) -> dict[str, Any]:
    """Return an identity in which a mapping that is all of a list stands alone."""
    found: dict[str, Any] = _copied(values)
    for key in _alone_or_listed():
        listed = selected(found, key)
        if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], Mapping):
            _put(found, key, listed[0])
    return found


def _free_folder(config: Mapping[str, Any], values: dict[str, Any]) -> Path:
    """Return the folder that is named after values, and is no other run's."""
    unnamed = {key: selected(config, key) for key in _unnamed()}
    for key in unnamed:
        _drop(values, key)
    while True:
        folder = _named_folder(config, values)
        there = recorded_config(folder).get("config", {})
        other = [key for key, value in unnamed.items() if _held(there, key, value) != value]
        if not other:
            return folder
        for key in other:
            group, _, name = key.rpartition(".")
            selected(values, group)[name] = unnamed.pop(key)


def _named_folder(config: Mapping[str, Any], values: dict[str, Any]) -> Path:
    return Path("outputs/train") / f"{config['name']}-{digest(values)[:8]}"


def _unnamed() -> list[str]:
    return [path for path, _, told in walk(Train) if told.unnamed]


def _held(config: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """Return a key's value in a recorded configuration."""
    group, _, name = key.rpartition(".")
    return (selected(config, group) or {}).get(name, otherwise)


def go_on_as_begun(config: Train, out: Path) -> Train:
    """Return the configuration without the ``unnamed`` keys that the run in a folder did not know.

    Their values mean what it did.
    """
    there = recorded_config(out).get("config", {})
    for key in _unnamed():
        group, _, name = key.rpartition(".")
        if group not in there or name in there[group]:
            continue
        inside = getattr(config, group)
        kept: Any
        if isinstance(inside, Mapping):
            # What its class takes later has there the same default.
            kept = {each: value for each, value in inside.items() if each != name}
        else:
            later = next(told.later for path, _, told in walk(Train) if path == key)
            stated = tuple(each for each in inside.stated if each != name)
            kept = replace(inside, **{name: later, "stated": stated})
        config = replace(config, **{group: kept})
    return config


DATA = "data.json"
"""Beside a run's identity: what its data was when it began, or was last changed on purpose."""


def claim_data(out: Path, now: Mapping[str, Any] | None, *, on_purpose: bool) -> None:
    """Check that a run goes on with the data it began with, and write down what that is.

    ``now`` is the data's fingerprint. A run that was begun before there were fingerprints gets one.

    Raises:
        ValueError: the data has changed, not ``on_purpose`` or in its number of classes; what has
            changed is told.
    """
    if now is None:
        return
    file = out / DATA
    before = _read_fingerprint(file) if file.exists() else now
    if before == now and (file.exists() or not os.access(out, os.W_OK)):
        return
    if before["sha256"] != now["sha256"] or before["classes"] != now["classes"]:
        changes = "; ".join(_data_changes(before, now))
        # A model of so many classes does not go on with more or fewer.
        goes_on = len(before["classes"]) == len(now["classes"])
        if not (on_purpose and goes_on):
            remedy = ", or go on with it on purpose: changed_data=true"
            raise ValueError(
                f"out={out}: the data has changed since the run began ({changes}): expected it as "
                f"it was; restore it, begin another run with another out{remedy * goes_on}"
            )
        print(f"the data has changed since the run began ({changes}), on purpose")
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Fingerprint:
    """What ``data.json`` says of a run's data.

    Example:
        >>> Fingerprint("9f86", images=3, classes={"cats": 1, "dogs": 2}).images
        3
    """

    sha256: str
    images: Natural
    classes: dict[str, Natural]


def _read_fingerprint(file: Path) -> dict[str, Any]:
    try:
        return vars(read_json_as(file, Fingerprint))
    except ValueError as error:
        raise ValueError(
            f"{file} cannot be read ({error}); delete it, and the data is taken to be what it was"
        ) from None


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what has changed between two fingerprints, a text for each kind of change."""
    old, new = before["classes"], now["classes"]
    gone = [f"{name} ({counted(old[name], 'image')})" for name in old if name not in new]
    added = [f"{name} ({counted(new[name], 'image')})" for name in new if name not in old]
    other = [f"{n}: {old[n]:,}, now {new[n]:,}" for n in old if n in new and old[n] != new[n]]
    changes = [
        f"{what} {some(names)}"
        for what, names in (("classes gone:", gone), ("new classes:", added), ("images of", other))
        if names
    ]
    if before["images"] != now["images"]:
        changes.append(f"{counted(before['images'], 'image')} in all, now {now['images']:,}")
    return changes or ["as many images of each class, but of other names or sizes"]


def check_schedule(config: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on to other ``max_steps`` with a learning rate that depends on them.

    Raises:
        ValueError: the schedule of the run in the folder ends at the ``max_steps`` of its start.
    """
    there = recorded_config(out).get("config", {})
    before, now = there.get("max_steps"), config["max_steps"]
    schedules = there.get("schedule") or {}, config["schedule"] or {}
    for key in schedules[0].keys() & schedules[1].keys():
        if before != now and (schedules[0][key], schedules[1][key]) == (before, now):
            raise ValueError(
                f"max_steps={now}: the learning rate of the run in out={out} follows from "
                f"max_steps={before} (schedule.{key}), so that it cannot go on to another; repeat "
                f"max_steps={before}, or choose another out"
            )


def changes(config: Mapping[str, Any], out: Path) -> dict[str, list[Any]]:
    """Return what of a run that goes on is other than at its last start: key -> before and now.

    These are keys that do not determine its weights; others are refused.
    """
    there = recorded_config(out).get("config", {})
    found = {}
    for key in changeable():
        group, _, name = key.rpartition(".")
        before, now = (selected(each, group) if group else each for each in (there, config))
        # A key that is newer than the run says nothing of it.
        if not isinstance(before, Mapping) or not isinstance(now, Mapping) or name not in before:
            continue
        old, new = before[name], now.get(name)
        if key in _alone_or_listed():
            old, new = ([each] if isinstance(each, Mapping) else each for each in (old, new))
        if not isinstance(new, Mapping) and plain(old) != plain(new):
            found[key] = [plain(old), plain(new)]
    return found


def changeable() -> list[str]:
    """Return the keys that may change while a run goes on; its folder's name is told anyway."""
    return [key for key in determining("train", "nothing") if key != "out"]


def note_changes(out: Path, changed: Mapping[str, list[Any]], step: int) -> None:
    """Record in a run's folder what is other from a step on, and tell it."""
    if not changed:
        return
    before = recorded_config(out).get("changed") or []
    claim.note(out, changed=[*before, {"step": step, "keys": dict(changed)}])
    told = [
        f"{key}={short(shown(new))} (was {short(shown(old))})"
        for key, (old, new) in changed.items()
    ]
    print(f"changed from step {step:,} on: {', '.join(told)}")


def begin_from(out: Path, parent: Path, step: int) -> None:
    """Record in a run's folder the run that it goes on from, and that run's own parent."""
    there = recorded_config(parent)
    lineage = {"parent": there["parent"]} if there.get("parent") else {}
    settings = there.get("settings", {})
    found = {"folder": str(parent), "step": step, "identity": digest(settings)}
    claim.note(out, parent={**found, **lineage})


def told_differences(out: Path, parent: Path, step: int) -> str:
    """Return in words from what a run goes on, and in what it differs from that."""
    lines = [f"goes on from step {step:,} of {parent}; what differs:"]
    own, theirs = recorded_config(out).get("settings", {}), recorded_config(parent)
    resuming = [key for key, _, _ in walk(Train) if key.startswith("resume_")]
    here = {key: value for key, value in own.items() if key not in resuming}
    before = {k: v for k, v in theirs.get("settings", {}).items() if k not in resuming}
    found = claim.differing(before, here) if theirs else ["nothing is known of its settings"]
    data = [each / DATA for each in (parent, out)]
    if all(file.exists() for file in data):
        old, new = map(_read_fingerprint, data)
        found += [f"data: {change}" for change in _data_changes(old, new) if old != new]
    return "\n".join([*lines, *(f"  {each}" for each in found or ["nothing"])])
