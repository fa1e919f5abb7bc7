"""The Python of docs/search.md, run as a reader copies it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


def test_it_draws_and_tells_what_was_chosen(capsys: Any) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    found = names["out"].found
    assert len(found) == 2
    # The verifier is ink, so that a score is the brightness of the image that it chose.
    for each, image in zip(found, names["out"].tensor, strict=True):
        assert abs(each.score - float(image.float().mean()) / 255) < 1e-6
    scores = eval(capsys.readouterr().out)
    assert [0 <= number < 4 and score <= 0 for score, number in scores] == [True, True]
