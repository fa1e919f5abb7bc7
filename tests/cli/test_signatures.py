"""What is read from files is what importing tells."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pkgutil import resolve_name

import pytest
import yaml

from sag_dit.cli.composing import config_folder
from sag_dit.cli.signatures import names_taken
from sag_dit.methods import methods
from sag_dit.training.optimizers import PACKAGES
from tests.cli.conftest import ROOT

OTHERS = {"torch.optim.AdamW", "lightning.pytorch.loggers.CSVLogger"}
TARGETS = {
    str(found["_target_"])
    for file in config_folder().rglob("*.yaml")
    if isinstance(found := yaml.safe_load(file.read_text(encoding="utf-8")), dict)
    and "_target_" in found
} | {f"sag_dit.guidance.{each.name}" for each in methods()}


@pytest.mark.parametrize(
    "target", sorted(TARGETS | {"torch.optim.AdamW", "lightning.pytorch.loggers.CSVLogger"})
)
def test_files_tell_what_a_target_takes(target: str) -> None:
    if target.partition(".")[0] in PACKAGES:
        pytest.importorskip(target.partition(".")[0])
    read = names_taken(target)
    taken = inspect.signature(resolve_name(target)).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        assert read is None
    else:
        assert read == {each.name for each in taken}


@pytest.mark.parametrize("target", ["no_such.Thing", "sag_dit.guidance.No", "Thing", "os.getcwd"])
def test_what_no_file_tells_is_not_known(target: str) -> None:
    assert names_taken(target) is None


def test_a_stranger_is_refused_without_importing_torch() -> None:
    for name, argument in (
        ("sample", "+guidance.sag.foo=1"),
        ("sample", "sampler.foo=1"),
        ("sample", "trainer.foo=1"),
        ("train", "data.foo=1"),
        ("train", "+optimizer.lrr=3"),
    ):
        code = f"""
import sys
from sag_dit.cli.{name} import main
needed = ["experiment=digits"] if "{name}" == "train" else ["sampler=ddim"]
try:
    main([*needed, "{argument}"])
except SystemExit as stop:
    sys.exit(10 * int(stop.code) + ("torch" in sys.modules))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 10, argument + done.stderr
        assert f"error: {argument.lstrip('+')}: " in done.stderr
