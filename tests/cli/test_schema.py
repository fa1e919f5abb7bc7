"""What the schema of each command refuses, hints at, and tells in ``--help``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sag_dit.cli import typed
from sag_dit.cli.app import launch, leaving_when_told
from sag_dit.cli.composing import FOLDER, checked_config, config_folder
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import HELD_OUT, keys_of, to_dict, walk
from sag_dit.cli.presets import with_presets
from sag_dit.methods import scales
from tests.cli.conftest import ROOT

COMMON = ("trainer=null", "trainer.devices=100000", "trainer.num_nodes=0", "experiment=3")
DRAWN = (
    *("sampler=null", "classes=nan", "classes=1.0", "classes=[1.5]", "classes=true", "steps=null"),
    *("steps=nan", "seed=-1", "text.size=[32]", "text.guidance=high", "ema=abc", "out=/"),
    *("text.size=[8,1e9]", "classes=[]", "ckpt=", "vae=", "out="),
)
GUIDED = (
    *("guidance=null", "size=S", "experiment=digits", "batch_size=1e9", "batch_size=0", "n=4"),
    *("sag_scale=nan", "sag_scale=inf", "sag_scale=1,0", "sag_scale=", "cfg_scale=null"),
    *("guidance.seg.blur_sigma=nan", "gallery=null", "gallery=3", "gallery.num=-1"),
    *("+sag_scal=1.0", "num_heads=0", "num_heads=nan", "++text.sise=[8,8]", "max_rows=0"),
)
REFUSED: dict[str, tuple[str, ...]] = {
    "sample": (
        *(*COMMON, *DRAWN, *GUIDED),
        *(
            "npz=abc",
            "maps=null",
            "attention.show=[0.5]",
            "attention.query=[0.5]",
            "num_images=1.5",
            "num_images=1e12",
            "guidance=[digits]",
        ),
        *(
            "ckpt=null",
            "hydra=3",
            "hydra/job_logging=3",
            "..=3",
            "~foo",
            "~sampler",
            "~steps",
            "requests=",
        ),
        *(
            "steps=${nope}",
            "steps=${oc.env:NOPE}",
            "steps=${ckpt}",
            "guidance.auto.ckpt=",
            "+guidance.a=1",
        ),
    ),
    "evaluate": (
        *(*COMMON, *DRAWN, *GUIDED),
        *("seeds=0", "confidence.repeats=1", "keep=abc", "plots=null", "num_images=0"),
        *("finished=/", "finished=", "samples=", "metrics=3", "metrics=nan", "metrics=[[fid]]"),
        *(
            "metrics={a:1}",
            "+compare.a=1",
            "+compare.a=null",
            "confidence.repeats=1e9",
            "seeds=1e9",
        ),
    ),
    "train": (
        *(*COMMON, "compile=abc", "matmul=abc", "name=null", "out=/", "experiment=paper/adm128"),
        *("max_steps=-1", "max_steps=nan", "max_steps=1.5", "max_steps=true", "max_steps=0"),
        *("model.hidden_size=0", "model.depth=-1", "model.num_heads=nan", "patch_size=0"),
        *("resolution=-8", "num_classes=0", "model.class_dropout_prob=nan", "kind=x"),
        *("model.class_dropout_prob=-1", "model.class_dropout_prob=2", "optimizer.lr=inf"),
        *("optimizer.weight_decay=inf", "optimizer.weight_decay=1e39"),
        *("optimizer.lr=nan", "optimizer.lr=-1", "optimizer.lr=1e38", "preview.steps=0"),
        *("+lora.alpha=inf", "+lora.rank=100000", "process.num_timesteps=1e8", "ema.decay=1"),
        *("+optimiser.lr=3", "every_n_steps.log=0", "preview.classes=[0.5]", "data.batch_size=0"),
        *("process=null", "sampler=ddim", "data=null", "size=null", "schedule=[cosine]"),
        *("max_steps=1e30", "model.depth=1e9", "num_classes=1e9", "model.learn_sigma=abc"),
        *("optimizer.betas=3", "optimizer.betas=[a,b]", "optimizer.betas=[0.9]"),
        *("optimizer.betas=[2,2]", "optimizer.fused=abc", "+process.time_scale=abc"),
        *("+process.foo=1", "+lora.foo=1", "+sampling.foo=1", "+track.foo=1", "+data.root="),
        *("freeze=[a]", "lora.rank=4"),
    ),
    "encode": (
        *("dtype=abc", "rows=0", "slice_size=1e9", "flip=3", "data.size=0", "out=/", "vea=x"),
        *("data.root=", "trainer=null", "size=S", "rows=1e9"),
    ),
    "export": ("format=null", "ema=abc", "out=/", "formt=dit", "steps=3", "size=S", "ckpt="),
    "attention": (
        *DRAWN,
        "device=tpu0",
        "attention.show=[0.5]",
        "attention.layers=3",
        "attention.show=[]",
        "sag_scale=1",
    ),
}
HINTS = {
    "sample": {
        "guidance_scale=3": "cfg_scale",
        "cfg=3": "cfg_scale",
        "num_inference_steps=3": "steps",
        "checkpoint=x": "ckpt",
        "n=4": "num_images",
        "sampler=DDIM": "ddim",
        "sampler=dpm": "kdpm2",
        "resume=true": "repeat the command",
        "--sag_scale 1.0": "sag_scale=1.0",
        "--sag-scale=1.0": "sag_scale=1.0",
        "sag_scale = 1.0": "write sag_scale=1.0 without spaces",
        "sag_scale= 1.0": "write sag_scale=1.0 without spaces",
        "out=X sag_scale = 1.0 seed=1": ": write sag_scale=1.0 without spaces",
        "out=X sag_scale =1.0": "error: sag_scale =1.0: write sag_scale=1.0 without spaces",
        "out=X =3": "error: =3: expected KEY=VALUE",
        "-m sampler=ddim,nope": "sampler=nope: expected one of auto, ddim",
        "-m sag_scale=0,{": "sag_scale=0,{: 0,{ cannot be read as a value",
        "-m sag_scale=range(0)": "-m: of sag_scale no value is left",
        "sag_scale=1,0": "sag_scale=1.0 with a point",
        "size=S": "train.py takes size=...; sample.py takes guidance, sampler",
    },
    "train": {
        "lr=3": "optimizer.lr",
        "learning_rate=3": "optimizer.lr",
        "+optimiser.lr=3": "optimizer.lr",
        "epochs=3": "max_steps",
        "resume=true": "repeat the same command",
        "class_dropout_prob=nan": "model.class_dropout_prob",
        "weight_decay=inf": "optimizer.weight_decay",
        "experiment=digits freeze=[a]": "there is freeze with experiment=finetune alone",
    },
    "evaluate": {
        "num_samples=9": "num_images",
        "+expected={source:a,metrics:3}": "expected.metrics=3: expected a mapping",
    },
    "encode": {"resolution=9": "data.size", "size=S": "encode.py takes no groups"},
    "export": {"layout=dit": "format"},
    "attention": {"checkpoint=x": "ckpt"},
}


def never(_: object) -> None:
    """Stand in for a command that must not be reached."""
    raise AssertionError("the command was run")


def error_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str
) -> str:
    """Return what a command says that refuses its arguments."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as stop:
        launch(name, never, arguments)
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told
    assert len(told.splitlines()) <= 2, "one sentence, and what may be meant"
    return told


@pytest.mark.parametrize(
    ("name", "argument"), [(name, each) for name, found in REFUSED.items() for each in found]
)
def test_a_value_that_cannot_be_meant_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, argument: str
) -> None:
    # What is needed besides, so that nothing else is wrong.
    needed = {"train": ["experiment=digits"], "encode": ["data.root=x"]}.get(name, [])
    needed = [] if argument.startswith(("experiment", "data.root=")) else needed
    told = error_of(capsys, monkeypatch, name, *needed, argument)
    assert argument.lstrip("+") in told.replace("error: +", "")


@pytest.mark.parametrize(
    ("name", "line", "hint"),
    [(name, line, hint) for name, found in HINTS.items() for line, hint in found.items()],
)
def test_habits_of_other_programs_get_a_hint(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    line: str,
    hint: str,
) -> None:
    assert hint in error_of(capsys, monkeypatch, name, *line.split(" "))


def test_an_error_of_the_system_is_told_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        launch("sample", lambda _: (tmp_path / "file" / "folder").mkdir(), ["ckpt=digits"])
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert f"error: {tmp_path}/file/folder cannot be used (Not a directory)" in told
    assert "Errno" not in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_told_to_stop_while_it_starts_leaves_in_words(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    before = signal.getsignal(number)

    def told_to_stop(_: str, arguments: Sequence[str]) -> Sequence[str]:
        signal.raise_signal(number)
        return arguments

    # Within another, as `evaluate.py` has it, it is told once.
    with pytest.raises(SystemExit) as stop, leaving_when_told():
        launch("sample", never, ["ckpt=digits"], prepare=told_to_stop)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err.count("stopped: ") == 1
    assert signal.getsignal(number) is before


def composed(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> list[Any]:
    """Return the configurations that a command is run with."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    found: list[Any] = []
    launch(name, found.append, arguments)
    return found


def test_whole_floats_are_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = composed(monkeypatch, "train", "experiment=digits", "max_steps=1e6")
    assert config.max_steps == 1_000_000 and type(config.max_steps) is int
    # A number that need not be whole keeps what it is, and so does the name of the run's folder.
    (config,) = composed(monkeypatch, "train", "experiment=digits", "optimizer.lr=1")
    assert type(config.optimizer["lr"]) is int


@pytest.mark.parametrize(
    ("name", "argument", "key"),
    [
        ("sample", "logger=null", "logger"),
        ("evaluate", "compare=null", "compare"),
        ("train", "schedule=null", "schedule"),
        ("train", "logger=null", "logger"),
        ("train", "track=null", "track"),
        ("sample", "experiment=null", "experiment"),
    ],
)
def test_a_group_of_null_is_none_where_none_has_a_meaning(
    monkeypatch: pytest.MonkeyPatch, name: str, argument: str, key: str
) -> None:
    needed = ["experiment=digits"] if name == "train" else []
    (config,) = composed(monkeypatch, name, *needed, argument)
    assert not getattr(config, key)


def test_flags_work_anywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in ("--cfg job steps=20", "steps=20 --cfg=job", "steps=20 --cfg job seed=1"):
        assert composed(monkeypatch, "sample", *with_presets("sample", line.split())) == []
        assert "steps: 20" in capsys.readouterr().out
    swept = with_presets("sample", ["-m", "sag_scale=0,1", "steps=2"])
    found = composed(monkeypatch, "sample", *swept)
    assert [(each.sag_scale, each.steps) for each in found] == [(0, 2), (1, 2)]


def test_ranks_of_a_sweep_are_started_with_one_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    seen = []
    launch("sample", lambda _: seen.append(list(sys.argv)), ["seed=0,1", "-m", "out=a=b"])
    assert seen == [["sample.py", f"seed={s}", f"out=a=b/seed={s}"] for s in (0, 1)]
    assert not list(tmp_path.iterdir()), "a sweep leaves nothing where one stands"


@pytest.mark.parametrize(
    ("name", "argument", "told"),
    [
        ("sample", "+guidance.sag.scael=1", "Did you mean scale"),
        ("sample", "+sampler.etha=1", "Did you mean eta"),
        ("train", "+optimizer.learn=1", "torch.optim.AdamW takes no learn"),
    ],
)
def test_keys_added_to_an_open_mapping_are_those_of_its_target(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    argument: str,
    told: str,
) -> None:
    needed = ["experiment=digits"] if name == "train" else []
    assert told in error_of(capsys, monkeypatch, name, *needed, argument)


def test_what_is_open_by_design_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = "+guidance.mine={_target_: sag_dit.guidance.SAG, scale: 2}"
    (config,) = composed(monkeypatch, "sample", mine, "++guidance.sag.blur_in=grid")
    assert config.guidance["mine"]["scale"] == 2
    (config,) = composed(monkeypatch, "train", "experiment=digits", "+trainer.max_time=00:01:00:00")
    assert config.trainer["max_time"] == "00:01:00:00"


def every_configuration() -> list[tuple[str, str]]:
    """List every choice of every group, with a command that takes it."""
    return [
        (name, f"{group}={choice}")
        for group in ("experiment", *sorted(takers()))
        for name in (("evaluate", "train") if group == "experiment" else takers()[group][:1])
        for choice in (typed.experiments(name) if group == "experiment" else typed.choices(group))
    ]


def takers() -> dict[str, list[str]]:
    """Return the commands that take each group, but for experiments."""
    found: dict[str, list[str]] = {}
    for name in COMMANDS:
        for group in set(typed.groups(name)) - {"experiment"}:
            found.setdefault(group, []).append(name)
    return found


@pytest.mark.parametrize(("name", "argument"), every_configuration())
def test_every_choice_of_every_group_passes(name: str, argument: str) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(name, [argument, *(["max_steps=3"] if name == "train" else [])])
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "photos")
    before: Any = OmegaConf.to_container(config, resolve=True)
    after = to_dict(checked_config(name, config))
    # In the same order; ${out} is known later.
    assert json.dumps(after).replace(f'"{FOLDER}"', "null") == json.dumps(before)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key_of_the_configuration_is_declared(name: str) -> None:
    """Declared keys stand in the YAML, or come with an experiment, a group or a method."""
    written = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())
    declared = keys_of(COMMANDS[name])
    groups = set(typed.groups(name))
    assert set(written) - {"defaults", "hydra"} <= set(declared)
    missing = {key for key, (_, told) in declared.items() if key not in written and not told.absent}
    assert missing <= groups | set(scales())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_imports_nothing_heavy(name: str) -> None:
    wrong, told = "out=/", "out=/: expected a folder of its own"
    if name == "studio":  # It writes nothing.
        wrong, told = "steps=0", "steps=0: expected"
    code = f"""
import json, sys
from sag_dit.cli.{name} import main
sys.argv = ["{name}.py", {wrong!r}, "data.root=x"][: 3 if "{name}" == "encode" else 2]
try:
    main()
except SystemExit as stop:
    heavy = [each for each in ("torch", "lightning", "timm", "diffusers") if each in sys.modules]
    print(json.dumps([stop.code, heavy]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [1, []]
    assert told in done.stderr


def test_what_a_key_needs_is_declared() -> None:
    """A key that is misspelt there would be missing always, and so what needs it refused."""
    for schema in COMMANDS.values():
        declared = {path for path, *_ in walk(schema)}
        needed = {need for _, _, told in walk(schema) for need in told.needs} - {HELD_OUT}
        assert {key for need in needed for key in need.split(" or ")} <= declared


def test_a_finished_command_imports_nothing_heavy_but_torch(tmp_path: Path) -> None:
    """Loading a DiT, telling its cost and finding its images need neither Lightning nor timm."""
    code = f"""
import json, sys
from sag_dit.cli.sample import main
sys.argv = ["sample.py", "ckpt=digits", "num_images=1", "steps=2", "out={tmp_path}/a",
    "sag_scale=1", "seg_scale=1", "trainer.accelerator=cpu"]
main()
heavy = ["lightning", "timm", "torchvision", "diffusers", "torchmetrics", "wandb", "torch._dynamo"]
print(json.dumps([each for each in heavy if each in sys.modules]))
"""
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        said.append(json.loads(done.stdout.splitlines()[-1]))
    assert "lightning" in said[0]
    assert said[1] == []
