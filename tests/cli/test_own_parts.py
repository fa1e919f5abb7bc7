"""Parts of one's own by ``_target_``: what the replaced one was told does not stand in the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from sag_dit.cli import evaluate
from sag_dit.cli.composing import compose, make
from sag_dit.cli.sample import main
from sag_dit.sampler import DDIM, Sampler

QUICK = ("ckpt=digits", "num_images=1", "steps=1", "gallery.num=0", "sag_scale=0")
CPU = ("trainer.accelerator=cpu", "trainer.devices=1")


@dataclass(frozen=True)
class Slower(DDIM):
    """DDIM under another name, with an option."""

    key = "test_slower"
    pause: float = 0.0


def only(*, pause: float = 0.0) -> Sampler:
    """A sampler that takes none of the options of the default one."""
    return Slower(pause=pause)


ONLY = f"{__name__}.only"


def test_options_of_the_replaced_class_go_and_those_stated_stay() -> None:
    default = compose("sample", ["sampler=ddim"]).sampler
    assert "eta" in default
    own = compose("sample", ["sampler=ddim", f"sampler._target_={ONLY}", "sampler.pause=0.5"])
    assert own.sampler == {"_target_": ONLY, "pause": 0.5}
    stated = compose("sample", ["sampler=ddim", f"sampler._target_={ONLY}", "sampler.eta=0.5"])
    with pytest.raises(ValueError, match=r"sampler.eta: .* takes no eta"):
        make(stated.sampler, "sampler")


def test_a_class_of_ones_own_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main([*QUICK, *CPU, f"sampler._target_={ONLY}", f"out={tmp_path}/out"])
    assert "images: " in capsys.readouterr().out
    assert (tmp_path / "out" / "images" / "000000.png").exists()


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("sampler._target_=no_such.Euler", "there is no module no_such; start Python where"),
        ("sampler._target_=fractions.Fraction", "makes a Fraction; expected a subclass of sag_dit"),
        (f"guidance.sag._target_={ONLY}", "makes a Slower; expected a subclass of sag_dit.guid"),
        (f"sampler._target_={ONLY} sampler.paus=1", "takes no paus\nDid you mean pause?"),
    ],
)
def test_what_is_no_part_is_told(
    argument: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*argument.split(), "sag_scale=0.5", *QUICK[:-1], *CPU, f"out={tmp_path}/out"]
    with pytest.raises(SystemExit):
        main(arguments)
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_sweep_takes_a_folder_of_configurations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text(f"_target_: {ONLY}\npause: 0.5\n")
    swept = ["-m", "--config-dir", str(tmp_path), "sampler=ddim,mine", "sag_scale=0"]
    results = [f"out={tmp_path}/out", f"finished={tmp_path}/finished", "gallery.num=0"]
    few = ["ckpt=digits", "num_images=8", "steps=1", "metrics=[fid]", "batch_size=8"]
    evaluate.main([*swept, *few, *CPU, *results])
    table = capsys.readouterr().out
    assert "sampler ddim" in table and "sampler mine" in table
