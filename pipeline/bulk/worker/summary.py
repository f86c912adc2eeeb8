"""The result of one shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Summary:
    """What a shard came to, for progress and the run's record. Times in seconds."""

    shard: int
    images: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # images by kind
    label_errors: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0  # the network waited for pixels
    infer_s: float = 0.0
    committed: bool = False  # False: another writer was first
    actor: str = ""  # who did it, and how long that one had lived then
    actor_s: float = 0.0
