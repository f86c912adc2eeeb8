"""A Ray actor handle without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class LocalActor:
    """A handle whose remote calls are plain calls of `instance`."""

    def __init__(self, instance: object) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._instance, name))
