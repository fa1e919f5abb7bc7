"""What only Linux has is asked for before it is used, so that macOS and Windows do without."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from sag_dit.cli import app
from sag_dit.data.training_batches import workers_per_process

PACKAGE = Path(__file__).resolve().parents[1] / "sag_dit"
# Not on macOS, or not on Windows.
ELSEWHERE_MISSING = {
    "os": {
        *("sched_getaffinity", "sched_setaffinity", "sched_yield", "posix_fadvise", "memfd_create"),
        *(
            "eventfd",
            "pidfd_open",
            "getrandom",
            "copy_file_range",
            "splice",
            "getxattr",
            "setxattr",
        ),
        *(
            "O_DIRECTORY",
            "O_DIRECT",
            "O_TMPFILE",
            "O_NOATIME",
            "fork",
            "killpg",
            "getpgid",
            "setsid",
        ),
        *(
            "getuid",
            "geteuid",
            "getgid",
            "chown",
            "mkfifo",
            "statvfs",
            "getloadavg",
            "uname",
            "nice",
        ),
        *("sysconf", "wait", "WNOHANG", "setpriority", "posix_spawn"),
    },
    "signal": {
        *("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGALRM", "SIGQUIT", "SIGSTOP"),
        *("SIGCONT", "SIGPIPE", "alarm", "setitimer", "pause", "pthread_kill", "sigwait"),
    },
}
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "curses", "syslog"}


def offences(source: str) -> Iterator[str]:
    """What a file takes for granted: names of ``os`` and ``signal``, modules, paths of the kernel.

    A name may be used where the same file asks for it by ``hasattr`` or ``getattr``, and a module
    imported where its absence is caught.
    """
    tree = ast.parse(source)
    caught = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        and any(ast.unparse(each.type or node) == "ImportError" for each in node.handlers)
        for statement in node.body
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asked = {
        call.args[1].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("hasattr", "getattr")
        and isinstance(call.args[1], ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                if name in ELSEWHERE_MISSING.get(module, ()) and name not in asked:
                    yield f"{module}.{name}"
            case ast.Import(names=names) if node not in caught:
                yield from (each.name for each in names if each.name in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                missing = ELSEWHERE_MISSING.get(module, ())
                yield from (f"{module}.{each.name}" for each in names if each.name in missing)
                if module in MODULES:
                    yield module
            case ast.Constant(value=str(text)) if text.startswith(("/proc/", "/sys/", "/dev/shm")):
                yield text
            case ast.Constant(value="fork" | "forkserver"):
                yield node.value


def test_nothing_of_linux_is_taken_for_granted() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): list(offences(path.read_text()))
        for path in PACKAGE.rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("os.kill(1, signal.SIGKILL)", ["signal.SIGKILL"]),
        ("getattr(signal, 'SIGKILL', signal.SIGTERM)", []),
        ("from os import fork, getpid", ["os.fork"]),
        ("import fcntl", ["fcntl"]),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
        ("n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1", []),
        ("open('/proc/self/statm')", ["/proc/self/statm"]),
        ("get_context('fork')", ["fork"]),
        ("os.replace(a, b)", []),
    ],
)
def test_what_is_taken_for_granted_is_found(source: str, expected: list[str]) -> None:
    assert list(offences(source)) == expected


def test_loader_processes_where_cores_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (workers_per_process(), workers_per_process(3)) == (6, 2)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers_per_process() == 1


def test_ranks_are_ended_where_there_is_no_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(signal, "SIGKILL"):
        assert app.KILL == signal.SIGKILL
    monkeypatch.delattr(signal, "SIGKILL", raising=False)
    spec = spec_from_file_location("app_again", app.__file__)
    assert spec is not None and spec.loader is not None
    again = module_from_spec(spec)
    spec.loader.exec_module(again)
    assert signal.SIGTERM == again.KILL
