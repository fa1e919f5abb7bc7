"""The package where only torch, Lightning and a few others are installed, Weights & Biases not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bare import CARRIED, PRESENT, closure, modules_outside
from tests.data.making import image_folder, save_vae

ROOT = Path(__file__).resolve().parents[1]

ENCODING = ("data.size=16", "slice_size=2", "workers=0")

START = """
import sys
from bare import hide_others
hidden = hide_others()
assert "wandb" not in sys.modules
"""

IMPORT_ALL = """
import importlib, pkgutil, sag_dit
found = [m.name for m in pkgutil.walk_packages(sag_dit.__path__, "sag_dit.")]
names = [name for name in found if not name.startswith("sag_dit.studio.")]  # Gradio's.
for name in names:
    importlib.import_module(name)
assert len(names) > 100, len(names)
"""

DRAW = """
import torch
import sag_dit
model = sag_dit.load("digits")
images = sag_dit.sample(model, classes=[3, 7], guidance=[sag_dit.SAG(scale=1.0)], steps=2)
assert images.dtype == torch.uint8 and len(images) == 2 and images.float().std() > 1
"""

COMMAND = """
from pathlib import Path
sys.argv[1:] = {arguments!r}
sys.argv[0] = "{name}.py"
from sag_dit.cli.{name} import main
main()
assert Path({made!r}).is_file(), "made no {made}"
"""

END = """
print(*hidden.missed, sep="\\n", file=sys.stderr)
assert not hidden.missed, hidden.missed
assert not hidden.modules & {name.partition(".")[0] for name in sys.modules}
print("done")
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", path + START + program + END],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_list_holds_what_the_issue_names_and_no_tracker() -> None:
    kept = closure((*PRESENT, *CARRIED))
    assert {"torch", "timm", "diffusers", "torchmetrics", "scipy"} <= kept
    assert kept.isdisjoint({"wandb", "torch-fidelity", "peft", "tensorboard", "matplotlib"})
    assert {"pytest", "packaging", "yaml", "torch"} & modules_outside(kept) == {"pytest"}


def test_the_package_imports_and_draws(tmp_path: Path) -> None:
    done = run(IMPORT_ALL + DRAW, tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "made"),
    [
        ("sample", ["num_images=2", "steps=2", "gallery.num=1", "out=o"], "o/index.html"),
        ("train", ["experiment=digits", "max_steps=2", "out=o"], "o/model.safetensors"),
        ("evaluate", ["ckpt=digits", "num_images=20", "steps=2", "out=o"], "o/results.json"),
        ("export", ["ckpt=digits", "format=safetensors", "out=o"], "o/model.safetensors"),
        ("encode", ["data.root=photos", "vae=vae", "out=o", *ENCODING], "o/index.json"),
    ],
)
def test_the_commands_work(name: str, arguments: list[str], made: str, tmp_path: Path) -> None:
    if name == "encode":
        save_vae(tmp_path / "vae")
        image_folder(tmp_path / "photos", each=2)
    done = run(COMMAND.format(name=name, arguments=arguments, made=made), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize(
    ("name", "arguments", "library"),
    [
        ("sample", [], "wandb"),
        ("train", ["experiment=digits"], "tensorboard"),
        ("evaluate", ["ckpt=digits"], "wandb"),
    ],
)
def test_a_logger_that_is_not_installed_is_refused_before_any_work(
    name: str, arguments: list[str], library: str, tmp_path: Path
) -> None:
    arguments = [*arguments, "out=o", f"logger={library}"]
    done = run(COMMAND.format(name=name, arguments=arguments, made="o"), tmp_path)
    assert done.returncode == 1
    assert f"pip install {library}, or choose logger=csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("statement", ["import wandb", "import matplotlib.pyplot", "import pytest"])
def test_what_is_hidden_is_missed(statement: str, tmp_path: Path) -> None:
    done = run(statement, tmp_path)
    assert done.returncode != 0 and "ModuleNotFoundError" in done.stderr
    quiet = f"""
import sag_dit, types
module = types.ModuleType("sag_dit.trying")
exec('''try:\\n    {statement}\\nexcept ImportError:\\n    pass''', module.__dict__)
"""
    done = run(quiet, tmp_path)
    assert done.returncode != 0
    assert f"sag_dit.trying looks for {statement.split()[1].partition('.')[0]}" in done.stderr
