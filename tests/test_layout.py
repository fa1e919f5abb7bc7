"""The layout of the package: who may import whom, what stays light, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sag_dit"

# Later groups see earlier ones, never the other way round. Members of one group are strangers.
ORDER: tuple[frozenset[str], ...] = (
    frozenset({"bounds", "messages", "raised"}),
    frozenset({"profiling", "tensors", "files", "untrusted", "identity", "methods", "catalogue"}),
    frozenset({"process"}),
    frozenset({"noise", "sampler", "attention"}),
    frozenset({"models"}),
    frozenset({"denoiser"}),
    frozenset({"codec", "checkpoints", "guidance"}),
    frozenset({"traces"}),
    frozenset({"sampling"}),
    frozenset({"pipelines", "data", "output", "evaluation"}),
    frozenset({"search"}),
    frozenset({"training", "api"}),
    frozenset({"study"}),
    frozenset({"studio"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
RANK = {part: rank for rank, group in enumerate(ORDER) for part in group}

# (importer, imported): why these two of one group may know each other.
NEIGHBOURS = {
    ("sampler", "noise"): "a step draws its fresh noise from the source of its images",
    ("checkpoints", "codec"): "a loaded model carries the codec its latents belong to",
    ("evaluation", "data"): "a reference is read as training data is: splits, class folders, crop",
}

# What the parts may import from the package itself: not its public names, which are built on them.
PACKAGE_NAMES = frozenset({"__version__"})

# Libraries that only some parts may import; a module belongs to the parts above it.
CONFINED = {
    "lightning": ("data", "output", "evaluation", "training", "study", "cli"),
    "hydra": ("cli",),
    "diffusers": (
        "models.dit.layouts",
        "models.unet",
        "denoiser.text_conditional",
        "sampler.diffusers",
        "codec",
        "checkpoints",
        "pipelines",
    ),
}
SAME_LIBRARY = {
    "lightning_fabric": "lightning",
    "lightning_utilities": "lightning",
    "omegaconf": "hydra",
    "pytorch_lightning": "lightning",
}
# Import names that differ from the name of the distribution in pyproject.toml.
DISTRIBUTION = {
    "PIL": "pillow",
    "hydra": "hydra-core",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


class Import(NamedTuple):
    """One name that a module imports, with dots: `torch.nn`, `sag_dit.process.base.Step`."""

    importer: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: {self.name}"


def module_name(path: Path) -> str:
    """`sag_dit/process/base.py` -> `sag_dit.process.base`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, importer: str, is_package: bool = False) -> Iterator[Import]:
    """Everything that a module imports, wherever in the file, also by `import_module("...")`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(importer, alias.name, node.lineno)
            case ast.ImportFrom(module=module, names=names, level=level):
                home = importer.split(".")
                base = home[: len(home) - level + is_package] if level else []
                for alias in names:
                    name = ".".join([*base, *([module] if module else []), alias.name])
                    yield Import(importer, name, node.lineno)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(importer, name, node.lineno)


def part(name: str) -> str:
    """`sag_dit.process.base` -> `process`; the package itself -> the empty string."""
    return ".".join(name.split(".")[1:2])


def wrong_way(imported: Import) -> bool:
    """Whether an import from within the package goes against `ORDER`."""
    importer, target = part(imported.importer), part(imported.name)
    if not importer or importer == target or (importer, target) in NEIGHBOURS:
        return False
    if target not in RANK:
        return target not in PACKAGE_NAMES
    return RANK[target] >= RANK[importer]


def out_of_place(imported: Import) -> bool:
    """Whether a library is imported by a part that must do without it."""
    library = imported.name.split(".")[0]
    places = CONFINED.get(SAME_LIBRARY.get(library, library))
    importer = imported.importer.removeprefix("sag_dit.") + "."
    return places is not None and not importer.startswith(tuple(f"{p}." for p in places))


def all_imports() -> list[Import]:
    return [
        found
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in imports(path.read_text(), module_name(path), path.name == "__init__.py")
    ]


def internal(found: list[Import]) -> list[Import]:
    return [each for each in found if each.name.split(".")[0] == "sag_dit"]


def test_every_part_has_its_place() -> None:
    parts = {part(module_name(path)) for path in PACKAGE.rglob("*.py")} - {""}
    assert parts - RANK.keys() == set(), "add the new part to ORDER, and to docs/architecture.md"


def test_imports_go_one_way() -> None:
    offenders = [str(each) for each in internal(all_imports()) if wrong_way(each)]
    assert offenders == []


def test_neighbours_are_still_needed() -> None:
    found = all_imports()
    parts = {part(each.importer) for each in found}
    used = {(part(each.importer), part(each.name)) for each in internal(found)}
    assert {pair for pair in NEIGHBOURS.keys() - used if parts.issuperset(pair)} == set()


def test_libraries_stay_in_their_places() -> None:
    offenders = [str(each) for each in all_imports() if out_of_place(each)]
    assert offenders == []


def test_every_library_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(each for name, needs in extras.items() if name != "dev" for each in needs),
    ]
    declared = {each.split(">")[0].lower().replace("-", "_") for each in requirements}
    known = declared | {"sag_dit"} | sys.stdlib_module_names
    offenders = []
    for each in all_imports():
        library = each.name.split(".")[0]
        library = SAME_LIBRARY.get(library, library)
        if DISTRIBUTION.get(library, library).replace("-", "_") not in known:
            offenders.append(str(each))
    assert offenders == []


def test_importing_the_package_loads_nothing_else() -> None:
    program = (
        "import sys; before = set(sys.modules); import sag_dit; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "sag_dit" in loaded
    assert loaded - {"sag_dit"} - sys.stdlib_module_names == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", ["torch.nn"]),
        ("from torch import nn, Tensor", ["torch.nn", "torch.Tensor"]),
        ("from . import ddpm", ["sag_dit.process.ddpm"]),
        ("from .base import Step", ["sag_dit.process.base.Step"]),
        ("from ..cli import sample", ["sag_dit.cli.sample"]),
        ("def late():\n    import lightning", ["lightning"]),
        ("if TYPE_CHECKING:\n    import diffusers", ["diffusers"]),
        ("importlib.import_module('hydra.core')", ["hydra.core"]),
        ("'import wandb'", []),
    ],
)
def test_imports_are_found_wherever_they_are(source: str, expected: list[str]) -> None:
    found = imports(source, "sag_dit.process", is_package=True)
    assert [each.name for each in found] == expected


def test_relative_imports_of_a_module_start_at_its_package() -> None:
    found = imports("from .base import Step", "sag_dit.process.ddpm")
    assert [each.name for each in found] == ["sag_dit.process.base.Step"]


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("sag_dit.cli.sample", "sag_dit.tensors.Images", False),
        ("sag_dit.tensors", "sag_dit.cli.sample", True),
        ("sag_dit.process.ddpm", "sag_dit.process.base.Step", False),
        ("sag_dit.attention.tap", "sag_dit.noise.NoiseSource", True),
        ("sag_dit.sampler.base", "sag_dit.noise.NoiseSource", False),
        ("sag_dit.noise", "sag_dit.sampler.base", True),
        ("sag_dit.cli.sample", "sag_dit.SAG", True),
        ("sag_dit.cli.sample", "sag_dit.__version__", False),
        ("sag_dit", "sag_dit.guidance.SAG", False),
    ],
)
def test_direction_is_judged_right(importer: str, imported: str, wrong: bool) -> None:
    assert wrong_way(Import(importer, imported, 1)) is wrong


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("sag_dit.models.unet.network", "diffusers.UNet2DModel", False),
        ("sag_dit.models.dit.network", "diffusers.UNet2DModel", True),
        ("sag_dit.codec", "diffusers.AutoencoderKL", False),
        ("sag_dit.training.module", "pytorch_lightning", False),
        ("sag_dit.sampling", "pytorch_lightning", True),
        ("sag_dit.training.module", "omegaconf.DictConfig", True),
        ("sag_dit", "lightning", True),
        ("sag_dit.models.dit.network", "torch", False),
    ],
)
def test_places_of_libraries_are_judged_right(importer: str, imported: str, wrong: bool) -> None:
    assert out_of_place(Import(importer, imported, 1)) is wrong
