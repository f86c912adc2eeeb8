"""Which images are in the batch of a step, and how each of them is augmented.

Guarantees:
- A batch is a pure function of training list, seed, step and batch size; no step depends on
  earlier ones.
- An epoch is a permutation of the list, made from (seed, epoch). Batches run across the end of an
  epoch, so a batch may hold an image twice.
- A draw's seed is made from (seed, position in the run), so an image is augmented differently in
  each epoch.
- The parts of all workers, for any number of workers, are a partition of the batch.
- Random numbers come only from numpy's SeedSequence and PCG64, whose streams are stable between
  numpy versions; those of Generator's methods are not (NEP 19).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.checks import check_at_least

# first word of a spawn key: keeps the numbers of an epoch apart from those of a draw
_ORDER = 0
_AUGMENTATION = 1


@dataclass(frozen=True)
class Draw:
    """One image of a batch: its index, and the seed (0 to 2**64 - 1) of its augmentation."""

    index: int
    seed: int


def draw_batch(
    indices: Sequence[int], *, seed: int, step: int, batch_size: int
) -> tuple[Draw, ...]:
    """Return the `batch_size` draws of all workers together at `step`, counted from 0.

    `indices` is the training list: it holds the index of a repeated image several times. A list
    shorter than the batch starts over within it. Raises ValueError if the list is empty, `seed` or
    `step` is negative, or `batch_size` is less than 1.
    """
    if len(indices) == 0:
        raise ValueError(
            "indices is empty; a training list needs at least one image: is the split right?"
        )
    check_at_least("seed", seed, 0)
    check_at_least("step", step, 0)
    check_at_least("batch_size", batch_size, 1)
    first = step * batch_size
    return tuple(_draw(indices, seed, position) for position in range(first, first + batch_size))


def worker_draws(draws: Sequence[Draw], rank: int, world_size: int) -> tuple[Draw, ...]:
    """Return worker `rank`'s draws: every `world_size`-th, starting with number `rank`.

    The workers' parts differ in size by at most one draw. Raises ValueError if a worker would have
    none, or `rank` is not one of 0 to `world_size` - 1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: must be from 0 to {world_size - 1}, below world_size")
    if len(draws) < world_size:
        raise ValueError(
            f"batch_size {len(draws)}: each of the {world_size} workers needs an image; give at "
            f"most {len(draws)} workers, or a batch_size of at least {world_size}"
        )
    return tuple(draws[rank::world_size])


def _draw(indices: Sequence[int], seed: int, position: int) -> Draw:
    epoch, entry = divmod(position, len(indices))
    order = _permutation(seed, epoch, len(indices))
    words = np.random.SeedSequence(seed, spawn_key=(_AUGMENTATION, position))
    return Draw(int(indices[order[entry]]), int(words.generate_state(1, np.uint64)[0]))


@functools.lru_cache(maxsize=4)  # many steps share an epoch
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.intp]:
    """Return the order (length,) in which an epoch goes through the list."""
    words = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
    keys = np.random.PCG64(words).random_raw(length)
    order: NDArray[np.intp] = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order
