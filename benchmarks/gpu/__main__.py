"""Measure on a GPU, all in one command: ``python -m benchmarks.gpu [--peer PATH/TO/DiT]``.

    tests      the GPU tests: what only a GPU shows, and that everything works there at all
    passes     DiT-XL/2 at 256 x 256: milliseconds a pass, capture, images a second end to end
    speeds     images a second end to end with speed=exact, fast and fastest
    peers      the same by facebookresearch/DiT (needs --peer, a checkout) and diffusers
    training   a training step of XL/2 and B/2; peers' steps beside it (--peer, --fast)
    large      512 x 512: capture at 1,024 tokens, images a second

Each phase is a process of its own with its own time limit, so that one that fails or hangs loses
nothing of the others; ``gpu.json`` and ``gpu.md`` are written anew after every phase. It needs no
network and no published weights: random weights of the published sizes have the same speed.
``--tiny`` runs every phase with tiny networks, also on a CPU: it shows that the command works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.rows import Row, Rows, append, markdown, read
from sag_dit.cli.app import quiet_lightning

PHASES = {
    "tests": ("What only a GPU shows (`tests/gpu`)", 130),
    "passes": ("DiT-XL/2 at 256 x 256", 150),
    "speeds": ("`speed=exact`, `fast` and `fastest`, DiT-XL/2 at 256 x 256", 80),
    "peers": ("Beside facebookresearch/DiT and diffusers", 90),
    "training": ("A training step", 150),
    "large": ("512 x 512", 60),
}
"""Title and limit in seconds of each phase, most valuable first."""
LIMIT = 480
"""Seconds for all of them."""
ROOT = Path(__file__).resolve().parents[2]


def facts() -> dict[str, str]:
    """Return what the figures depend on."""
    import diffusers
    import lightning
    import torch

    import sag_dit

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a dry run"
    return {
        "card": card,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "diffusers": diffusers.__version__,
        "Python": platform.python_version(),
        "sag_dit": sag_dit.__version__,
    }


def gpu_tests(file: Path, tiny: bool) -> None:
    """Run the GPU tests and keep what they state, what failed and what was skipped."""
    report, stated = file.with_suffix(".xml"), file.with_suffix(".stated")
    stated.unlink(missing_ok=True)
    environment = {**os.environ, "SAG_DIT_GPU_REPORT": str(stated)}
    if tiny:
        environment["SAG_DIT_GPU_TESTS_ON"] = "cpu"
    # The project's own pytest options are for its pinned pytest and torch.
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-o", "addopts="]
    command += ["-o", "minversion=", "-W", "default", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-q", "-rs", "--durations=8", "--tb=short"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}"]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    for line in stated.read_text("utf-8").splitlines() if stated.exists() else []:
        entry = json.loads(line)
        note = "" if entry.get("bound") is None else f"bound: {entry['bound']}"
        append(file, Row("tests", entry["what"], "", entry["value"], "", note))
    if not report.exists():
        raise SystemExit(f"pytest ended with {code} and left no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name", "?") for case in cases if case.find("failure") is not None]
    failed += [case.get("name", "?") for case in cases if case.find("error") is not None]
    skipped = [case.get("name", "?") for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    append(file, Row("tests", "tests passed", "", float(passed), "", ""))
    append(file, Row("tests", "tests failed", "", float(len(failed)), "", ", ".join(failed)))
    append(file, Row("tests", "tests skipped", "", float(len(skipped)), "", ", ".join(skipped)))
    if code:
        raise SystemExit(f"pytest ended with {code}")


def one_phase(name: str, options: argparse.Namespace) -> None:
    """Run one phase in this process."""
    file = Path(options.out) / "gpu.rows"
    if name == "tests":
        gpu_tests(file, options.tiny)
        return
    from benchmarks.sizes import FULL_SCALE, TINY_SCALE

    quiet_lightning()
    scale = TINY_SCALE if options.tiny else FULL_SCALE
    phase = importlib.import_module(f"benchmarks.{'' if name == 'peers' else 'gpu.'}{name}")
    rows = Rows(file, name)
    phase.run(scale, rows, peer=options.peer, fast=options.fast)
    if rows.failed:
        raise SystemExit(f"{rows.failed} measurements of {name} failed")


def supervised(name: str, arguments: list[str], limit: float, file: Path) -> bool:
    """Run one phase as a process of its own; return whether it ended well and in time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--phase", name, *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout=limit)
        how = f"ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        how = f"stopped at its limit of {limit:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    took = time.perf_counter() - start
    append(file, Row(name, "this phase took", "", round(took, 1), "s", how))
    return not how


def write(out: Path, about: dict[str, str]) -> None:
    """Write what there is so far."""
    rows = read(out / "gpu.rows")
    document = {"facts": about, "rows": [row._asdict() for row in rows]}
    (out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    titles = {name: title for name, (title, _) in PHASES.items()}
    (out / "gpu.md").write_text(markdown(about, titles, rows), "utf-8")


def main() -> None:
    """Run all phases, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="outputs/gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument("--peer", help="a checkout of facebookresearch/DiT")
    parser.add_argument("--fast", help="a checkout of chuanyangjin/fast-DiT")
    parser.add_argument("--only", nargs="*", choices=list(PHASES), help="phases to run")
    parser.add_argument("--tiny", action="store_true", help="a dry run with tiny networks")
    parser.add_argument("--limit", type=float, help="seconds for all phases")
    parser.add_argument("--phase", choices=list(PHASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        one_phase(options.phase, options)
        return
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.rows"
    file.unlink(missing_ok=True)
    about = facts()
    if about["card"].startswith("no GPU") and not options.tiny:
        raise SystemExit("no GPU is here; --tiny makes a dry run on the CPU")
    arguments = ["--out", str(out)] + ["--tiny"] * options.tiny
    for name in ("peer", "fast"):
        if folder := getattr(options, name):
            arguments += [f"--{name}", str(Path(folder).resolve())]
    start, well = time.perf_counter(), True
    limit = options.limit or (4 * LIMIT if options.tiny else LIMIT)
    for name in options.only or PHASES:
        left = limit - (time.perf_counter() - start)
        print(f"{name} ({left:.0f} s left)", flush=True)
        if left < 5:
            append(file, Row(name, "this phase", "", "not run: no time was left", "", ""))
            well = False
        else:
            own = left if options.tiny else min(PHASES[name][1], left)
            well = supervised(name, arguments, own, file) and well
        write(out, about)
    print((out / "gpu.md").read_text("utf-8"))
    print(f"table: {out / 'gpu.md'}")
    if not well:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
