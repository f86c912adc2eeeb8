"""The line that a job ends with, for who reads logs: words, then `key=value` pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping


def last_line(words: str, facts: Mapping[str, object]) -> str:
    """`words` and the facts; a value that is more than a word is in double quotes, as in JSON."""
    return " ".join([words, *(f"{name}={_quoted(value)}" for name, value in facts.items())])


def failed(job: str, code: int, error: object) -> int:
    """Prints how `job` ended with exit code `code`, and gives that code back."""
    reason = " ".join(str(error).split())
    print(last_line(f"{job} failed", {"exit": code, "reason": reason}), flush=True)
    return code


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not set(text) & set(" \"'\\=")
    return text if plain else json.dumps(text, ensure_ascii=False)
