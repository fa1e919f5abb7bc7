"""``tune.py`` on the bundled digits: budgets, resuming, workers, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from sag_dit.cli import sample as sample_command
from sag_dit.cli import tune as command
from sag_dit.cli.app import launch
from sag_dit.cli.presets import with_presets
from sag_dit.denoiser import ClassConditional
from sag_dit.files import using
from sag_dit.study.journal_lock import JournalLock
from tests.cli.conftest import ROOT

pytest.importorskip("optuna")

SMALL = (
    *("ckpt=digits", "steps=4", "num_images=12", "rungs=2", "seeds=2", "methods=[cfg,sag]"),
    *("trainer.accelerator=cpu", "batch_size=12", "gallery.num=2", "out=study"),
)
BUDGET = 1600


@dataclass(frozen=True)
class Outcome:
    """What the command gave back."""

    code: int
    out: str
    err: str
    rows: int
    """How many rows the network was asked for."""


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of the tests of one study."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("tuned")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def running(patch: pytest.MonkeyPatch) -> Run:
    """Run the command here, and count what the network is asked for."""
    patch.setenv("HYDRA_FULL_ERROR", "1")
    patch.setattr(sys, "argv", ["tune.py"])
    evaluate, rows = ClassConditional.evaluate, 0

    def counting(self: ClassConditional, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        nonlocal rows
        rows += x_t.shape[0]
        return evaluate(self, x_t, t, cond)

    patch.setattr(ClassConditional, "evaluate", counting)

    def run(*arguments: str) -> Outcome:
        nonlocal rows
        rows, code = 0, 0
        with pytest.MonkeyPatch.context() as out:
            from io import StringIO

            streams = StringIO(), StringIO()
            out.setattr(sys, "stdout", streams[0])
            out.setattr(sys, "stderr", streams[1])
            try:
                command.start_tune(arguments)
            except SystemExit as stop:
                assert isinstance(stop.code, int)
                code = stop.code
        return Outcome(code, streams[0].getvalue(), streams[1].getvalue(), rows)

    return run


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return running(monkeypatch)


@pytest.fixture(scope="module")
def study(place: Path) -> Iterator[tuple[Path, Outcome, Run]]:
    """A finished study: its folder, what the command said, and the command."""
    with pytest.MonkeyPatch.context() as patch:
        run = running(patch)
        done = run(*SMALL, f"budget={BUDGET}passes")
        assert done.code == 0, done.err
        yield place / "study", done, run


def facts(folder: Path) -> list[dict[str, Any]]:
    """What is written beside the numbers of every set of images."""
    files = sorted((folder / "measured").glob("*.json"))
    return [json.loads(file.read_text())["facts"] for file in files]


def trials(folder: Path) -> list[Any]:
    """The trials in the journal of a study."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / "trials.log")))
    found: list[Any] = optuna.load_study(study_name="tune", storage=storage).trials
    return found


def test_it_keeps_to_its_budget_by_count(study: tuple[Path, Outcome, Run]) -> None:
    folder, done, _ = study
    lines = (folder / "spent.jsonl").read_text().splitlines()
    spent = sum(json.loads(line)["passes"] for line in lines)
    # What the ledger says is what the network was asked for.
    assert spent == done.rows
    assert 0.6 * BUDGET < spent <= BUDGET


def test_it_chooses_on_one_split_and_confirms_on_the_other(
    study: tuple[Path, Outcome, Run],
) -> None:
    folder, _, _ = study
    searched = [each for each in facts(folder) if each["reference"] == "digits:tune"]
    confirmed = [each for each in facts(folder) if each["reference"] == "digits:report"]
    assert len(searched) + len(confirmed) == len(facts(folder))
    # Common random numbers: one seed, and the same classes; other seeds confirm.
    assert {each["seed"] for each in searched} == {0}
    assert {each["seed"] for each in confirmed} == {1, 2}
    assert {each["classes"] for each in facts(folder)} == {"all"}
    assert {each["count"] for each in searched} == {12, 36}
    results = json.loads((folder / "results.json").read_text())["results"]
    assert [each["name"] for each in results][:2] == ["unguided", "CFG 1.5"]
    assert all(each["against"] == "unguided" and each["change"] for each in results[1:])
    assert "digits:report" in (folder / "card.md").read_text()
    page = (folder / "index.html").read_text()
    assert "Confirmed: FD" in page and "candidate " in page


def test_the_best_go_on_with_the_images_that_they_have(study: tuple[Path, Outcome, Run]) -> None:
    folder, _, _ = study
    values = [trial.values for trial in trials(folder) if trial.values]
    (file,) = (folder / "decided").glob("*rung_1.json")
    chosen = json.loads(file.read_text())["trials"]
    assert chosen[0] == command.UNGUIDED
    undominated = {
        tuple(one)
        for one in values
        if not any(other[0] <= one[0] and other[1] <= one[1] and other != one for other in values)
    }
    assert undominated & {tuple(trials(folder)[number].values) for number in chosen[1:]}
    # A third, or more where more of them are undominated; each drew 24 further images.
    assert len(chosen) - 1 <= max(len(undominated), -(-len(values) // 3)) + 1


def test_a_finished_study_says_so_and_does_nothing(study: tuple[Path, Outcome, Run]) -> None:
    folder, _, run = study
    before = (folder / "spent.jsonl").read_bytes(), (folder / "trials.log").read_bytes()
    for budget in (f"{BUDGET}passes", "1000passes"):
        again = run(*SMALL, f"budget={budget}")
        assert (again.code, again.rows) == (0, 0)
        assert "this study is finished" in again.out and "a larger budget goes on" in again.out
    assert before == ((folder / "spent.jsonl").read_bytes(), (folder / "trials.log").read_bytes())


def test_another_study_is_refused_in_its_folder(study: tuple[Path, Outcome, Run]) -> None:
    _, _, run = study
    refused = run(*SMALL, "budget=9000passes", "max_cost=1.5")
    assert refused.code == 1 and "holds a study of other settings" in refused.err
    assert "max_cost" in refused.err


def test_the_preset_draws_what_the_winner_drew(
    study: tuple[Path, Outcome, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = study
    winner = folder / "configs" / "guidance" / "digits_tuned.yaml"
    assert yaml.safe_load(winner.read_text())["steps"] == 4
    keys = ["ckpt=digits", "guidance=digits_tuned", "num_images=12", "batch_size=12", "out=drawn"]
    keys += ["--config-dir", str(folder / "configs"), "trainer.accelerator=cpu", "gallery.num=0"]
    launch("sample", sample_command.run_sample, keys, prepare=with_presets)
    settings = yaml.safe_load(Path("drawn/config.yaml").read_text())["settings"]
    sets = [
        each.parent
        for each in (folder / "images").glob("*/config.yaml")
        if yaml.safe_load(each.read_text())["settings"] == settings
    ]
    assert len(sets) == 1
    for number in range(12):
        name = f"images/{number:06d}.png"
        assert (Path("drawn") / name).read_bytes() == (sets[0] / name).read_bytes()
    # What the user states still stands above the preset.
    stated = [*keys, "sag_scale=0", "cfg_scale=1"]
    assert with_presets("sample", stated) == stated


@pytest.mark.slow
def test_a_larger_budget_goes_on(study: tuple[Path, Outcome, Run]) -> None:
    folder, _, run = study
    before = len(trials(folder))
    more = run(*SMALL, "budget=4000passes")
    assert more.code == 0, more.err
    assert 0 < more.rows <= 4000 - 0.6 * BUDGET
    assert len(trials(folder)) > before


def test_a_stopped_study_goes_on(tune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is kept, and what was being drawn has failed; nothing is drawn twice."""
    measure, calls = command.Tuning.measure, 0

    def stopping(self: Any, measured: Any, text: str, num: int = 0) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise SystemExit(130)
        return measure(self, measured, text, num)

    keys = (*SMALL, "budget=1600passes")
    with monkeypatch.context() as patch:
        patch.setattr(command.Tuning, "measure", stopping)
        stopped = tune(*keys)
    assert stopped.code == 130
    assert "what is measured is kept; repeat the command to go on" in stopped.err
    first = [(each.number, each.values) for each in trials(Path("study")) if each.values]
    assert len(first) == 3
    after = tune(*keys)
    assert after.code == 0, after.err
    found = trials(Path("study"))
    assert [(each.number, each.values) for each in found[:3]] == first
    assert found[3].state.name == "FAIL"
    assert stopped.rows + after.rows <= 1600


def test_another_process_is_let_in_only_if_both_say_so(tune: Run, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    with using(folder):
        for keys in ((), ("workers=2",)):
            refused = tune(*SMALL, "budget=1600passes", *keys)
            assert refused.code == 1 and "another run is using this folder" in refused.err
    with using(folder, shared=True):
        refused = tune(*SMALL, "budget=1600passes")
        assert refused.code == 1 and "another run is using this folder" in refused.err
        with using(folder, shared=True):
            pass
        # It is still held by who was there first.
        with pytest.raises(ValueError, match="another run"), using(folder):
            pass
    with using(folder):
        pass
    assert not (folder / ".lock").exists()


def started(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tune.py"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    keys = (*SMALL, f"budget={BUDGET}passes")
    process = started(*keys, folder=tmp_path)
    ledger = tmp_path / "study" / "spent.jsonl"
    deadline = time.monotonic() + 300
    while not (ledger.exists() and len(ledger.read_text().splitlines()) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = [(each.number, each.values) for each in trials(tmp_path / "study") if each.values]
    again = started(*keys, folder=tmp_path)
    out, err = again.communicate(timeout=900)
    assert again.returncode == 0, err
    assert "page: " in out
    found = trials(tmp_path / "study")
    values = {each.number: each.values for each in found}
    assert len(kept) >= 2 and all(values[number] == value for number, value in kept)
    assert not [each for each in found if each.state.name == "RUNNING"]


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    keys = (*SMALL, f"budget={BUDGET}passes", "workers=2")
    both = [started(*keys, folder=tmp_path) for _ in range(2)]
    told = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    lines = [
        json.loads(line) for line in (tmp_path / "study" / "spent.jsonl").read_text().splitlines()
    ]
    # The second one draws what the first has begun, at most, beyond the limit of a rung.
    assert sum(each["passes"] for each in lines) <= BUDGET * 1.1
    found = [each for each in trials(tmp_path / "study") if each.values]
    assert len({each.number for each in found}) == len(found) > 4
    # Both have drawn, and both tell of the same page.
    assert all("candidate " in out for out, _ in told)
    assert len({out.splitlines()[-1] for out, _ in told}) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("budget=soon",), "budget=soon: expected a time or passes, such as 10min"),
        (("budget=10",), "budget=10: expected a time or passes, such as 10min"),
        (("budget=50passes",), "a study takes at least"),
        (("methods=[sagg]",), "Did you mean sag"),
        (("methods=sag",), "methods=sag: expected a list of methods"),
        (("methods=[]",), "methods=[]: expected a list of methods"),
        (("methods=[auto]",), "methods: auto cannot be tried"),
        (("max_cost=0.5",), "max_cost=0.5: expected"),
        (("max_cost=1",), "other methods"),
        (("seeds=1",), "seeds=1: expected"),
        (("steps=[]",), "steps=[]: expected"),
        (("quality=fud",), "fud"),
        (("name=a/b",), "name=a/b: expected a name of letters"),
        (("requests=lines.csv",), "requests=lines.csv: the first images of a set"),
        (("report=digits:tune",), "report=digits:tune: expected other images"),
        (("trainer.devices=2",), "trainer.devices=2: one process of a study draws on one device"),
        (("n_trials=100",), "budget says how long"),
        (("-m", "steps=2,3"), "such as steps=[10,20]"),
        (("timeout=60",), "did you mean budget?"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant_is_told_in_a_sentence(
    tune: Run, arguments: tuple[str, ...], told: str
) -> None:
    keys = {each.partition("=")[0]: each for each in (*SMALL, "budget=1600passes", *arguments)}
    refused = tune(*keys.values())
    assert refused.code == 1
    assert told in refused.err and "Traceback" not in refused.err
    assert "error: " in refused.err


def test_the_model_is_digits_unless_another_is_stated(tune: Run) -> None:
    others = [each for each in SMALL if not each.startswith("ckpt=")]
    assert "a study takes at least" in tune(*others, "budget=50passes").err


def test_a_journal_is_not_held_by_whom_was_killed(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from sag_dit.study.journal_lock import JournalLock;"
        "JournalLock(Path('trials.log')).acquire(); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    lock = JournalLock(tmp_path / "trials.log")
    assert lock.acquire()
    lock.release()


def test_without_optuna_the_remedy_is_told(tune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "optuna" else find(name))
    refused = tune(*SMALL)
    assert refused.code == 1
    assert 'pip install -e ".[tune]"' in refused.err


def test_a_model_of_the_users_needs_two_references(
    tune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.Tuning, "_default_reference", lambda self: None)
    assert "reference is not set" in tune(*SMALL).err
    assert "report is not set" in tune(*SMALL, "reference=digits:tune").err
