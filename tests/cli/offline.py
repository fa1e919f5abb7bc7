"""Reading what Weights & Biases keeps to upload when it is offline."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record


def staged_tables(folder: Path) -> list[tuple[dict[str, Any], dict[str, Path]]]:
    """Return the tables, and by sha256 all files, that wait to be uploaded."""
    files = {
        hashlib.sha256(file.read_bytes()).hexdigest(): file
        for file in folder.rglob("*")
        if file.is_file()
    }
    texts = [file.read_bytes() for file in files.values()]
    return [(json.loads(text), files) for text in texts if text.startswith(b'{"_type": "table"')]


def records(run: Path) -> list[Record]:
    """Everything that is going to be uploaded of one start, from its file of LevelDB's log format.

    After 7 bytes of its own come records in parts: checksum (4 bytes), length (2), kind (1: whole,
    2 to 4: first to last part) and content; no part's head crosses a border of 32 KiB.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("*.wandb")
    deadline, found = time.monotonic() + 60, [Record()]
    # It is written for a moment longer than ``finish`` takes.
    while not found[-1].HasField("exit") and time.monotonic() < deadline:
        data, place, content, found = file.read_bytes(), 7, b"", [Record()]
        while place < len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
            length, kind = struct.unpack_from("<HB", data, place + 4)
            content += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                found.append(Record())
                found[-1].ParseFromString(content)
                content = b""
    return found


def history(run: Path) -> list[dict[str, Any]]:
    """The logged rows of one start."""
    rows = [record.history.item for record in records(run) if record.HasField("history")]
    return [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows
    ]
