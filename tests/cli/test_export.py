"""``export.py`` from its command line: what it prints, writes, finds out and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sag_dit.checkpoints import load
from sag_dit.cli import export
from sag_dit.cli.app import launch
from tests.cli.conftest import ROOT, SaveOfficial, random_dit


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["export.py"])
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command and return what it printed."""
    launch("export", export.run_export, arguments)
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails, and return its error."""
    with pytest.raises(SystemExit) as stop:
        launch("export", export.run_export, arguments)
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("layout", ["dit", "safetensors"])
def test_bundled_model(capsys: pytest.CaptureFixture[str], layout: str) -> None:
    printed = run(capsys, "ckpt=digits", f"format={layout}", "out=an export, of 'digits'")
    path = Path(printed.split("export: ")[1].strip())
    assert path.parent.name == "an export, of 'digits'"
    assert ("note: the network's outputs are equal" in printed) is (layout == "dit")
    ours, theirs = (load(ckpt).denoiser for ckpt in ("digits", path))
    for name, tensor in ours.network.state_dict().items():
        assert torch.equal(theirs.network.state_dict()[name], tensor)
    assert (theirs.kind, theirs.process) == (ours.kind, ours.process)
    assert "load_digits" in (path.parent / "README.md").read_text()
    again = run(capsys, "ckpt=digits", f"format={layout}", "out=an export, of 'digits'")
    assert again.endswith("(already there)\n")


def test_script_and_default_folder(here: Path) -> None:
    command = [sys.executable, str(ROOT / "export.py")]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = here / "outputs" / "export" / "digits-safetensors"
    assert f"export: {folder / 'model.safetensors'}" in done.stdout
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_card_names_a_runs_data(
    capsys: pytest.CaptureFixture[str], here: Path, save_official: SaveOfficial
) -> None:
    folder = here / "run" / "checkpoints"
    folder.mkdir(parents=True)
    ckpt = save_official(folder / "last.pt")
    config = here / "run" / "config.yaml"
    config.write_text("settings: {}\nconfig:\n  data:\n    root: photos/corgis\n")
    run(capsys, f"ckpt={ckpt}", "out=told")
    assert "root: photos/corgis" in Path("told/README.md").read_text()
    for strange in ("config: [1, 2]", "}: {", "settings: 3", "config: {data: ${gone"):
        config.write_text(strange)
        assert export.training_data(str(ckpt)) is None
    config.unlink()
    run(capsys, f"ckpt={ckpt}", "out=untold")
    assert "Not known" in Path("untold/README.md").read_text()


@pytest.mark.parametrize("ema", [True, False])
def test_ema_chooses_the_weights(capsys: pytest.CaptureFixture[str], here: Path, ema: bool) -> None:
    states = {name: random_dit(seed).state_dict() for seed, name in enumerate(("ema", "model"))}
    torch.save(states, here / "0000200.pt")
    (here / "0000200.json").write_text('{"model": {"num_heads": 3}}')
    printed = run(capsys, "ckpt=0000200.pt", "format=dit", "out=chosen", f"ema={str(ema).lower()}")
    written = torch.load(printed.split("export: ")[1].strip(), weights_only=True)
    expected = states["ema" if ema else "model"]
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["format=onnx"], "format=onnx: expected one of safetensors, dit"),
        (["format=null"], "format=null: expected one of safetensors"),
        (["ema=perhaps"], "ema=perhaps: expected true, false, a decay"),
        (["ema=false"], "holds one set of weights"),
        (["ckpt=digts"], "did you mean digits"),
        (["fromat=dit"], "Did you mean format"),
        (["format=diffusers"], "DiTPipeline cannot express this model: a pixel model"),
        (["format=dit", "out=model.pt"], "out=model.pt: expected a folder"),
        (["out=taken"], "not empty and not this export"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(
    capsys: pytest.CaptureFixture[str], here: Path, arguments: list[str], reason: str
) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "photo.png").write_text("x")
    error = refused(capsys, *arguments)
    assert reason in error and "Traceback" not in error
    assert [path.name for path in here.rglob("*")] == ["taken", "photo.png"]


def test_the_folder_is_looked_at_before_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a folder" in refused(capsys, "ckpt=nowhere.pt", "out=model.pt")


@pytest.mark.parametrize("layout", ["dit", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_no_use_are_not_exported(
    capsys: pytest.CaptureFixture[str],
    here: Path,
    save_official: SaveOfficial,
    layout: str,
    value: float,
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["blocks.0.attn.proj.bias"][3] = value

    ckpt = save_official(here / "diverged.pt", change=spoil)
    told = refused(capsys, f"ckpt={ckpt}", f"format={layout}", "out=nowhere")
    assert not Path("nowhere").exists()
    assert "diverged: weights that are NaN or infinite" in told
    assert "in blocks.0.attn.proj.bias; choose an earlier checkpoint" in told
    # It can still be looked into.
    assert not load(ckpt).class_conditional.network.blocks[0].attn.proj.bias.isfinite().all()
