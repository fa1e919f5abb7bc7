"""What a command of several processes says, on the first of them alone."""

from __future__ import annotations

import os
import sys
from functools import cache


def is_first_rank() -> bool:
    """Whether this process is no rank but the first, whoever has started it."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


@cache
def tell_once(line: str) -> None:
    """Print a line on stderr, once in a process, on the first rank alone."""
    if is_first_rank():
        print(line, file=sys.stderr)
