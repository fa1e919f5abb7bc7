"""What is stated at the command line acts, or is refused, or is told; misspelt names are mended."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sag_dit.cli import first_rank, run_identity
from sag_dit.cli.composing import compose, make, refuse_strangers
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.schema import refuse_idle
from sag_dit.cli.typed import check_arguments
from sag_dit.messages import nearest

Command = Callable[..., Any]

DIGITS = ("experiment=digits", "max_steps=2", "data.batch_size=16", "logger=none")
SHORT = ("trainer.accelerator=cpu", "trainer.devices=1", "every_n_steps.checkpoint=2")

MINE = '''
import torch
from sag_dit.models import Backbone
from torch import nn

class Plain(Backbone):
    """A network without attention."""

    def __init__(self, in_channels, num_classes, side=8, note: str = "a", share: float = 0.5):
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = (side, side), in_channels, num_classes
        self.layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        return self.layer(x)

class HandsOn(Plain):
    def __init__(self, kernel: str = "box", **options):
        super().__init__(**options)

class Momentum(torch.optim.SGD):
    def __init__(self, params, lr=0.1, mu=0.9):
        super().__init__(params, lr=lr, momentum=mu)

class Anything(torch.optim.SGD):
    def __init__(self, params, lr=0.1, mu=0.9, **options):
        super().__init__(params, lr=lr, momentum=mu)

class Watch:
    pass

def broken(each):
    return {"lr": each.parametr}

class Picky:
    def __init__(self, table):
        table["key"]

    def __call__(self, each):
        return {}
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the user's own in the working directory, on the path, not yet imported."""
    (tmp_path / "my_stated.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_stated", raising=False)
    first_rank.tell_once.cache_clear()
    return tmp_path


# --- misspelt names -------------------------------------------------------------------------------


def test_close_names_whatever_their_capitals_and_the_order_of_letters() -> None:
    assert nearest("um", ["mu", "lr"]) == "\nDid you mean mu?"
    assert nearest("UNET", ["UNet", "DiT"]) == "\nDid you mean UNet?"
    assert nearest("zzz", ["UNet", "DiT"]) == ""


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("my_stated.Plian", "Plain"),
        ("my_statde.Plain", "my_stated"),
        ("torch.optin.Adam", "optim"),
        ("torch.optim.Adamm", "Adam or "),
        ("troch.optim.Adam", "torch"),
        ("sag_dit.samplr.DDIM", "sampler"),
        ("sag_dit.sampler.DIDM", "DDIM"),
    ],
)
@pytest.mark.parametrize("where", ["model", "optimizer", "data", "trainer.callbacks[0]"])
def test_a_misspelt_target_names_what_is_close(
    mine: Path, target: str, meant: str, where: str
) -> None:
    with pytest.raises(ValueError) as error:
        make({"_target_": target}, where)
    told, _, hint = str(error.value).partition("\nDid you mean ")
    assert told.startswith(f"{where}._target_={target}: ") and hint.startswith(meant)


def test_a_module_that_a_module_imports_is_not_the_one_that_is_misspelt(mine: Path) -> None:
    (mine / "my_broken.py").write_text("import my_statde")
    with pytest.raises(ValueError, match=r"there is no module my_statde; [^\n]*$"):
        make({"_target_": "my_broken.Plain"}, "model")


def test_a_module_that_fails_is_not_misspelt(mine: Path) -> None:
    (mine / "my_failing.py").write_text("lost\n\n\nclass Plain: ...")
    with pytest.raises(ValueError, match=r"_target_=my_failing.Plain: name 'lost' [^\n]*$"):
        make({"_target_": "my_failing.Plain"}, "model")


def test_an_argument_of_ones_own_class(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"takes no um\nDid you mean mu\?"):
        make({"_target_": "my_stated.Momentum", "um": 0.8, "_partial_": True}, "optimizer")
    # One that takes anything may do with it what it likes: what is close is told.
    refuse_strangers("optimizer", ["my_stated.Anything"], ["um", "mu", "foreach"])
    told = capsys.readouterr().err
    assert told.startswith("optimizer.um: my_stated.Anything takes any name")
    assert told.endswith("Did you mean mu?\n") and told.count("\n") == 1
    # What it hands on to one that does not take it.
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'noet'\nDid you mean note"):
        make({"_target_": "my_stated.HandsOn", "in_channels": 1, "num_classes": 2, "noet": 1}, "m")


def test_an_error_in_a_class_of_ones_own_names_it(mine: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^rule: my_stated.Picky fails with KeyError: 'key' \(.*my_stated.py, line \d+\)$",
    ):
        make({"_target_": "my_stated.Picky", "table": {}}, "rule")


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["nan", "inf", "null", "1e3", "007", "yes", "0x10", "true", "3", "1_0", "-.5"]
)
def test_an_argument_that_is_a_text_is_the_text_as_typed(mine: Path, text: str) -> None:
    own = ("model._target_=my_stated.HandsOn", f"model.kernel={text}")
    assert compose("train", [*DIGITS, *own]).model["kernel"] == text
    quoted = ("model._target_=my_stated.Plain", f"model.note='{text}'")
    assert compose("train", [*DIGITS, *quoted]).model["note"] == text


def test_numbers_stay_numbers(mine: Path) -> None:
    own = ("model._target_=my_stated.Plain", "model.share=1e-1", "model.side=8")
    made = compose("train", [*DIGITS, *own]).model
    assert (made["share"], made["side"]) == (0.1, 8)


# --- keys that act on nothing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ("ema.warmup=true ema.decay=null", "ema.decay is null"),
        ("keep.snapshots=9", "ema.further.sigma_rel is []"),
        ("every_n_steps.snapshot=9", "ema.further.sigma_rel is []"),
        ("finetune.weights=raw", "ckpt is null"),
        ("resume_optimizer=false", "resume_from is null"),
        ("resume_schedule=anew resume_from=run", "schedule is null"),
    ],
)
def test_a_key_that_acts_on_nothing_is_refused(stated: str, why: str) -> None:
    arguments = stated.split()
    with pytest.raises(ValueError) as error:
        refuse_idle(compose("train", [*DIGITS, *arguments]))
    key = arguments[0].partition("=")[0]
    assert str(error.value).startswith(f"{arguments[0]} acts on nothing, since {why}: leave {key}")


def test_what_a_file_says_in_vain_and_what_says_nothing_is_let_pass() -> None:
    refuse_idle(compose("train", [*DIGITS, "ema.decay=null"]))
    further = ("ema.decay=null", "ema.warmup=true", "ema.further.decays=[0.9]")
    refuse_idle(compose("train", [*DIGITS, *further]))
    refuse_idle(compose("train", [*DIGITS, "ema.further.sigma_rel=[]", "keep.last=3"]))
    refuse_idle(compose("train", [*DIGITS, "ema.further.sigma_rel=[0.1]", "keep.snapshots=9"]))


@pytest.mark.parametrize("stated", ["keep.best=1", "every_n_steps.validation=5"])
def test_keys_of_validation_need_held_out_images(stated: str) -> None:
    config = compose("train", ["experiment=folder", "data.root=photos", stated])
    refuse_idle(config)
    with pytest.raises(ValueError, match=f"^{stated} acts on nothing, since nothing is validated"):
        refuse_idle(config, validates=False)
    off = compose("train", ["experiment=folder", "data.root=photos", "keep.best=0"])
    refuse_idle(off, validates=False)


def test_a_size_beside_a_checkpoint_is_refused(in_process: Command, mine: Path) -> None:
    tune = ("experiment=finetune", "ckpt=digits", "data=digits", *SHORT, "max_steps=1", "out=run")
    refused = in_process("train", *tune, "size=S")
    assert refused.code == 1 and "ckpt=digits determines size: expected null" in refused.err
    assert not (mine / "run").exists()


# --- one key twice --------------------------------------------------------------------------------


def test_the_last_of_a_key_counts_and_the_others_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_rank.tell_once.cache_clear()
    stated = ["size=S", "seed=1", "size=B", "seed=2", "seed=2", "model={depth: 2}"]
    kept = check_arguments("train", [*stated, "model={num_heads: 2}"], [])
    assert kept == ["size=B", "seed=2", "++model.depth=2", "++model.num_heads=2"]
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == [
        "seed=2 overrides seed=1, which stands before it",
        "size=B overrides size=S, which stands before it",
    ]


@pytest.mark.parametrize(
    ("stated", "keys"),
    [
        ("model={depth: 2, num_heads: 3}", ["++model.depth=2", "++model.num_heads=3"]),
        ("++model={depth: 2, num_heads: 3}", ["++model.depth=2", "++model.num_heads=3"]),
        (
            "preview={steps: 3, guidance: {sag: null}}",
            ["preview.steps=3", "preview.guidance.sag=null"],
        ),
        ("ema={}", ["ema={}"]),
        ("ema={decay: 0.5", ["ema={decay: 0.5"]),
        (
            "logger={_target_: a.B, name: 'x, {y', tags: [a, {b: 1}]}",
            ["++logger._target_=a.B", "++logger.name='x, {y'", "++logger.tags=[a, {b: 1}]"],
        ),
        ("trainer.callbacks={_target_: a.B}", ["++trainer.callbacks={_target_: a.B}"]),
    ],
)
def test_a_mapping_is_its_keys(stated: str, keys: list[str]) -> None:
    assert check_arguments("train", [stated], []) == keys


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ("keep={snapshot: 3}", "keep.snapshots"),
        ("preview={step: 3}", "preview.steps"),
        ("ema.further={sigma: [0.1]}", "ema.further.sigma_rel"),
    ],
)
def test_a_key_of_a_mapping_is_checked_as_any_other(stated: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"no such key\nDid you mean {meant}"):
        check_arguments("train", [stated], [])


def test_arguments_of_a_group_of_which_nothing_is_chosen(in_process: Command, mine: Path) -> None:
    refused = in_process("train", *DIGITS, "schedule.warmup=5")
    assert refused.code == 1 and "schedule.warmup=5: schedule is null: choose" in refused.err
    assert "schedule=warmup as well" in refused.err
    # A schedule is made with the optimiser, whether that is said or not.
    own = "schedule={_target_: torch.optim.lr_scheduler.StepLR, step_sizee: 3}"
    refused = in_process("train", *DIGITS, own)
    assert refused.code == 1 and "takes no step_sizee\nDid you mean step_size?" in refused.err
    done = in_process("train", *DIGITS, *SHORT, own.replace("sizee", "size"), "out=run")
    assert done.code == 0, done.err


# --- the identity of a run ------------------------------------------------------------------------


def plain(*arguments: str) -> dict[str, Any]:
    values: dict[str, Any] = to_dict(compose("train", [*DIGITS, *arguments]))
    return values


CALLBACK = "{_target_: my_stated.Watch, every: 2}"


@pytest.mark.parametrize("key", ["trainer.callbacks", "trainer.plugins"])
def test_a_callback_alone_and_in_a_list_are_one_run(mine: Path, key: str) -> None:
    alone, listed = plain(f"++{key}={CALLBACK}"), plain(f"++{key}=[{CALLBACK}]")
    assert run_identity.identity(alone) == run_identity.identity(listed)
    assert run_identity.run_folder(alone) == run_identity.run_folder(listed)
    # A run that was begun when they were two is still found, by either.
    former = run_identity._standing_alone(run_identity.identity(listed))
    assert former != run_identity.identity(listed)
    folder = run_identity._free_folder(listed, copy.deepcopy(former))
    new = run_identity.run_folder(listed)
    assert folder != new
    folder.mkdir(parents=True)
    assert run_identity.run_folder(listed) == run_identity.run_folder(alone) == folder
    record = {"settings": yaml.safe_load(yaml.safe_dump(_plain(former))), "config": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    run_identity.claim.claim(folder, run_identity.identity(listed), listed, "a run")


def _plain(values: Any) -> Any:
    return run_identity.claim.written(values)


def test_of_a_long_setting_only_what_differs_is_shown() -> None:
    differing = run_identity.claim.differing
    one = [{"_target_": "a.B", "every": 1}, {"_target_": "a.C", "every": 2, "text": "x" * 700}]
    two = [one[0], {**one[1], "every": 3}]
    assert differing({"callbacks": one}, {"callbacks": two}) == [
        "callbacks[1].every: there 2, now 3"
    ]
    (gone,) = differing({"callbacks": one}, {"callbacks": None})
    assert len(gone) < 200 and gone.endswith(", now None")
    (lost, longer) = differing({"callbacks": one}, {"callbacks": one[:1], "resolution": [8, 16]})
    assert lost.startswith("callbacks[1]") and longer == "resolution: there not set, now [8, 16]"
    assert differing({"callbacks": one[0]}, {"callbacks": one[:1]}) == []


# --- networks without attention -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:kernel_size")
def test_default_guidance_is_left_out_of_what_cannot_have_it(
    in_process: Command, mine: Path
) -> None:
    own = (*DIGITS, *SHORT, "model._target_=my_stated.Plain", "out=run")
    refused = in_process("train", *own, "preview.guidance.sag.scale=0.5")
    assert refused.code == 1 and "preview.guidance.sag=null" in refused.err
    done = in_process("train", *own, "every_n_steps.preview=2", "preview.steps=2")
    assert done.code == 0, done.err
    told = "previews are drawn without preview.guidance.sag, since this model has no self-attention"
    assert done.out.count(told) == 1 and (mine / "run/previews/step-00000002.png").exists()
    draw = ("sample", "ckpt=run", "imports=[my_stated]", *SHORT[:2], "num_images=1", "steps=2")
    drawn = in_process(*draw, "out=drawn", "gallery.num=0")
    assert drawn.code == 0, drawn.err
    assert "images are drawn with sag_scale=0, since this model has no self-attention" in drawn.out
    # The same images as where it is stated.
    again = in_process(*draw, "out=drawn", "gallery.num=0", "sag_scale=0")
    assert again.code == 0, again.err
    assert "are drawn with" not in again.out
    for stated in ("sag_scale=1", "guidance.sag.scale=1"):
        refused = in_process(*draw, "out=other", stated)
        assert refused.code == 1 and "leave SAG out: sag_scale=0" in refused.err


# --- rules for parameters -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (
            "[{match: bias, wieght_decay: 0}]",
            r"param_groups\[0\]: wieght_decay: .*\nDid you mean weight_decay\?",
        ),
        ("[{match: bias, weight_decay: 0.1}]", r"names that hold bias are matched by '\*bias\*'"),
        (
            "[{_target_: my_stated.broken}]",
            r"param_groups\[0\]: at the parameter x_embedder\S* broken fails with AttributeError",
        ),
    ],
)
def test_rules_tell_what_is_wrong_and_where(
    in_process: Command, mine: Path, rules: str, told: str
) -> None:
    refused = in_process("train", *DIGITS, *SHORT, f"param_groups={rules}", "out=run")
    assert refused.code == 1 and re.search(told, refused.err), refused.err
    assert not (mine / "run").exists()
