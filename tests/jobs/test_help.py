"""Output of --help: every flag of every job has its own description."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import pytest

JOBS = ("segment", "train", "evaluate", "query", "report", "clean", "coco", "benchmark")

ONE_SENTENCE_FOR_TWO = {"--mean", "--std"}


def flags(text: str) -> dict[str, str]:
    """Return the description of each flag without frame and default."""
    found: dict[str, str] = {}
    name = None
    _, _, boxes = text.partition("options")
    for line in (framed.strip("│╭╮╰╯ ") for framed in boxes.splitlines()):
        flag = re.match(r"(?:-h, )?(--[a-z0-9-]+)\b.*?(?: {2,}(.*))?$", line)
        if flag:
            name = flag[1]
            found[name] = flag[2] or ""
        elif not line or line[0] in "─-":
            name = None
        elif name:
            found[name] += f" {line}"
    return {
        name: re.sub(r"\((default: .*|required)\)$", "", text).strip()
        for name, text in found.items()
    }


@pytest.mark.parametrize("job", JOBS)
def test_each_flag_is_explained(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"jobs.{job}").main(["--help"])
    explained = flags(capsys.readouterr().out)

    assert ended.value.code == 0
    assert len(explained) > 2
    assert {name for name, text in explained.items() if not text} == set()
    times_used = Counter(
        text for name, text in explained.items() if name not in ONE_SENTENCE_FOR_TWO
    )
    assert {text for text, times in times_used.items() if times > 1} == set()
