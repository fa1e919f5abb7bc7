"""Kill commands at random moments and look at what comes of it: ``python -m benchmarks.torture``.

``make torture`` does the same. Four small commands (draw, train, encode, evaluate) run on 1, 2 and
3 ranks. A case is one of them, started, killed by SIGKILL, started again with the same words, some
times over, and at last left to end by itself. What is then there is compared, bit for bit, with
what the same command leaves when nobody disturbs it. Half of the kills come at any time, the others
when a file has just been seen under its temporary name. Each hits any one of the ranks.

Counted for each command are

- ``kills``, and ``cut``: those of them that left a file behind under its temporary name;
- ``files``: those that hold what they should: images, manifests, weights, latents, metrics;
- ``missing``, ``different``, ``broken``: files that are not there, hold something else (or should
  not be there), cannot be read;
- ``duplicates``: images that a manifest lists twice;
- ``orphans``: processes that are still there 5 seconds after their command has ended;
- ``failures``: commands that nobody killed and that ended badly or not at all, or that went on for
  a minute after they had lost a rank.

The seed fixes the order of commands and the times of kills; what a command is doing then differs
from one machine to another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import psutil
from PIL import Image
from safetensors import safe_open

from benchmarks.same_numbers import AUTOENCODER, TINY, content, write_pictures

ROOT = Path(__file__).resolve().parents[1]
OUTLIVES = 5.0
"""Seconds after which a process that outlives its command is an orphan."""
ENDS = 60.0
"""Seconds within which a command ends that has lost a rank."""
HANGS = 900.0
"""Seconds after which a command that nobody killed is taken to hang."""
MOST = 8
"""Kills in one case."""
FAULTS = ("missing", "duplicates", "broken", "different", "orphans", "failures")
COUNTED = ("cases", "kills", "cut", "files", *FAULTS, "seconds")


@dataclass(frozen=True)
class Setting:
    """A command: its name, and what stands behind ``python``."""

    name: str
    arguments: tuple[str, ...]

    @contextmanager
    def running(self, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Start it in this folder, as the first of a process group of its own.

        It ends by itself, or when the work within is interrupted.
        """
        folder.mkdir(exist_ok=True)
        with (folder / "printed.txt").open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, *self.arguments],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "SAG_DIT_CACHE": str(folder / "cache")},
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def settings(pictures: Path) -> list[Setting]:
    """Return all commands, each on 1, 2 and 3 ranks."""
    commands = {
        "sample": "ckpt=digits steps=3 num_images=30 batch_size=2 gallery.num=3 npz=true out=out",
        "train": f"experiment=digits {TINY} data.batch_size=12 max_steps=24 logger=none out=out "
        "every_n_steps.checkpoint=3 every_n_steps.validation=12 every_n_steps.preview=12",
        "encode": f"data.root={pictures} data.size=32 vae={AUTOENCODER} rows=1 slice_size=2 "
        "workers=1 out=out",
        "evaluate": "-m cfg_scale=1,1.5 ckpt=digits steps=2 num_images=24 batch_size=4 keep=true "
        "plots=false out=out finished=finished",
    }
    return [
        Setting(
            f"{name} on {ranks}",
            (
                *(str(ROOT / f"{name}.py"), *command.split()),
                *("trainer.accelerator=cpu", f"trainer.devices={ranks}"),
            ),
        )
        for ranks in (1, 2, 3)
        for name, command in commands.items()
    ]


def temporaries(folder: Path) -> set[str]:
    """Return the files that are being written in a folder, or were when they were cut."""
    return {
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith(".tmp")
    }


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the ranks of a command that are there by now, the first of them first."""
    found = []
    with suppress(psutil.NoSuchProcess):
        found.append(psutil.Process(process.pid))
        for child in found[0].children():
            # Processes that read images for the first rank are no ranks.
            with suppress(psutil.Error):
                if "LOCAL_RANK" in child.environ():
                    found.append(child)
    return found


def alive(group: int) -> list[int]:
    """Return the processes of a group, without those that have ended and wait for their parent."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def orphans(process: subprocess.Popen[bytes]) -> int:
    """Wait until all processes of a command that has ended are gone, and count those that stay."""
    deadline = time.monotonic() + OUTLIVES
    while (left := alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    return len(left)


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the start, or when so many files have been written."""

    after: float | None
    files: int

    @classmethod
    def drawn(cls, chance: random.Random, seconds: float) -> Moment:
        """Draw one for a command that takes so many seconds."""
        after, files = chance.uniform(0, seconds), chance.randint(1, 8)
        return cls(after if chance.random() < 0.5 else None, files)

    def comes(self, process: subprocess.Popen[bytes], folder: Path) -> bool:
        """Wait for it; False if the command has ended before."""
        before, seen, began = temporaries(folder), set[str](), time.monotonic()
        while process.poll() is None:
            if self.after is not None and time.monotonic() - began >= self.after:
                return True
            if self.after is None:
                seen |= temporaries(folder) - before
                if len(seen) >= self.files:
                    return True
            time.sleep(0.0005)
        return False


def compared(whole: Path, found: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with each file that says something of the results: (kind, file)."""
    expected, there = (
        {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
        for folder in (whole, found)
    )
    for name in sorted({*expected, *there}):
        wanted = content(expected[name]) if name in expected else None
        if name not in there:
            if wanted is not None:
                yield "missing", str(name)
            continue
        try:
            seen = content(there[name])
            if seen != wanted:
                _read(there[name])
                yield "different", str(name)
            elif seen is not None:
                yield "files", str(name)
        except Exception as error:
            yield "broken", f"{name}: {error}"
        if name.name == "manifest.jsonl":
            rows = [json.loads(line) for line in there[name].read_text().splitlines()]
            twice = len(rows) - len({row["file"] for row in rows})
            yield from [("duplicates", str(name))] * twice


def _read(file: Path) -> None:
    """Read all of an image or of weights, of which ``content`` takes the bytes as they are."""
    if file.suffix == ".png":
        with Image.open(file) as image:
            image.load()
    if file.suffix == ".safetensors":
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensors.get_tensor(name)


@dataclass
class Case:
    """A command that is killed some times and repeated, in a folder of its own."""

    setting: Setting
    folder: Path
    counts: Counter[str]
    notes: list[str]

    def note(self, kind: str, what: str) -> None:
        """Count a fault, and keep what it was."""
        self.counts[kind] += 1
        if kind in FAULTS:
            self.notes.append(f"{self.setting.name}: {kind}: {what}")

    def finish(self, process: subprocess.Popen[bytes], expected: bool) -> None:
        """See a command end: well where it is expected, and with all of its processes."""
        try:
            process.wait(HANGS if expected else ENDS)
        except subprocess.TimeoutExpired:
            self.note("failures", "hangs" if expected else f"went on {ENDS:.0f} s without a rank")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            expected = False
        if expected and process.returncode:
            printed = (self.folder / "printed.txt").read_text(errors="replace")
            self.note("failures", f"ended with {process.returncode}: {printed[-2000:]}")
        for _ in range(orphans(process)):
            self.note("orphans", "outlived its command")

    def kill(self, chance: random.Random, moment: Moment) -> bool:
        """Start the command and kill one of its ranks; False if it has ended before."""
        before = temporaries(self.folder)
        with self.setting.running(self.folder) as process:
            killed = moment.comes(process, self.folder)
            if killed and (ranks := ranks_of(process)):
                with suppress(psutil.NoSuchProcess):
                    chance.choice(ranks).kill()
                    self.counts["kills"] += 1
            self.finish(process, expected=not killed)
        self.counts["cut"] += bool(killed and temporaries(self.folder) - before)
        return killed

    def repeat(self) -> None:
        """Start the command again and let it end."""
        with self.setting.running(self.folder) as process:
            self.finish(process, expected=True)


def undisturbed(setting: Setting, folder: Path) -> float:
    """Run a command to its end and return the seconds that it took.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    with setting.running(folder) as process:
        process.wait()
    if process.returncode:
        raise RuntimeError(f"{setting.name}: {(folder / 'printed.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def torture(
    chosen: Sequence[Setting], place: Path, kills: int, seed: int, limit: float
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Kill until there were so many kills or the time is over; return counts by name, and notes."""
    chance, end = random.Random(seed), time.monotonic() + limit
    counts: dict[str, Counter[str]] = {}
    notes: list[str] = []
    took: dict[str, float] = {}
    made = 0
    for number, setting in enumerate(cycle(chance.sample(chosen, len(chosen)))):
        # A case takes about three times as long as its command alone: begin none that ends late.
        longest = max(took.values(), default=0.0)
        if made >= kills or time.monotonic() + 3 * longest > end:
            return counts, notes
        began = time.monotonic()
        whole, folder = place / setting.name, place / f"case {number}"
        if setting.name not in took:
            took[setting.name] = undisturbed(setting, whole)
        seconds = took[setting.name]
        case = Case(setting, folder, counts.setdefault(setting.name, Counter()), notes)

        # Kill it some times, and then let it end, if it has not come to its end before.
        before, ended = case.counts["kills"], False
        for _ in range(min(chance.randint(1, MOST), kills - made)):
            if not ended and time.monotonic() + 2 * seconds < end:
                ended = not case.kill(chance, Moment.drawn(chance, seconds))
        if not ended:
            case.repeat()
        made += case.counts["kills"] - before

        for kind, what in compared(whole, folder):
            case.note(kind, what)
        case.counts["cases"] += 1
        case.counts["seconds"] += round(time.monotonic() - began)
        print(f"{made} of {kills} kills, {setting.name}, {len(notes)} faults", flush=True)
    return counts, notes


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the counts as a table in Markdown, with their sums."""
    rows = {**counts, "all": sum(counts.values(), Counter())}
    lines = [["", *COUNTED], ["---", *["--:"] * len(COUNTED)]]
    lines += [[name, *(str(row[key]) for key in COUNTED)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, print the table, write the results; 1 if there was any fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="another series of kills")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop in this time")
    parser.add_argument("--only", default="", help="commands whose name holds this: 'train on 2'")
    parser.add_argument("--out", type=Path, default=Path("outputs/torture.json"))
    given = parser.parse_args(argv)

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sag_dit-torture-") as made:
        place = Path(made)
        write_pictures(place / "pictures")
        chosen = [each for each in settings(place / "pictures") if given.only in each.name]
        if not chosen:
            parser.error(f"--only {given.only}: there is no such command")
        counts, notes = torture(chosen, place, given.kills, given.seed, given.seconds)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"seed": given.seed, "seconds": round(time.monotonic() - began), "faults": notes}
    given.out.write_text(json.dumps({**results, "counts": counts}, indent=1) + "\n")

    print("\n".join(["", *notes, table(counts), "", f"results: {given.out}"]))
    return 1 if notes else 0


if __name__ == "__main__":
    raise SystemExit(main())
