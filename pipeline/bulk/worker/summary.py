"""The result of one shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ShardSummary:
    """The result of one shard, for the progress display and the run record. Times in seconds."""

    shard: int
    images: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # images by kind
    label_errors: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0  # waiting for decoded pixels
    infer_s: float = 0.0  # running the network
    committed: bool = False  # False: another writer committed the file first
    actor: str = ""  # name of the actor that processed it
    actor_s: float = 0.0  # age of that actor at the end of the shard
