"""Which photos are in the batch of a step, and with which augmentation.

Enters: the training list, a seed, a step, and for a worker's part its rank and how many there
are. Leaves: `Draw`s. What is guaranteed:
- A batch is a pure function of list, seed, step and batch size: no step needs the ones before.
- The list is gone through in epochs, each a permutation of it made from (seed, epoch), each
  entry once. A batch goes on from one epoch into the next, so it may hold a photo twice.
- A draw's seed is made from (seed, place in the run): no two draws of a run share their
  augmentation on purpose, and a photo's differs from epoch to epoch.
- The shares of any number of workers are together the batch, each draw in one of them.
- The numbers come from numpy's SeedSequence and PCG64 alone, whose streams numpy keeps between
  versions; a Generator's methods may change theirs (NEP 19), so they are not used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# first word of a spawn key, so that an epoch's numbers are not a draw's
_ORDER = 0
_AUGMENTATION = 1


@dataclass(frozen=True)
class Draw:
    """One photo of a batch: its index, and the seed (0 to 2**64 - 1) of its augmentation."""

    index: int
    seed: int


def batch(indices: Sequence[int], *, seed: int, step: int, batch_size: int) -> tuple[Draw, ...]:
    """The `batch_size` draws of all workers together at `step`, counted from 0.

    `indices` is the training list: a photo's index stands in it once, or several times where the
    photo is repeated. A list shorter than the batch is begun anew within it. Raises ValueError
    where the list is empty, `seed` or `step` below 0, or `batch_size` below 1.
    """
    if len(indices) == 0:
        raise ValueError("indices is empty; a training list needs a photo: is the split right?")
    for name, value, least in (("seed", seed, 0), ("step", step, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    first = step * batch_size
    return tuple(_draw(indices, seed, place) for place in range(first, first + batch_size))


def share(draws: Sequence[Draw], rank: int, world_size: int) -> tuple[Draw, ...]:
    """Return worker `rank`'s draws: every `world_size`-th, beginning with the `rank`-th.

    Shares differ by at most one draw. Raises ValueError where a worker would have none, or
    `rank` is not 0 to `world_size` - 1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank is {rank}; with a world size of {world_size} it must be 0 to {world_size - 1}"
        )
    if len(draws) < world_size:
        raise ValueError(
            f"batch_size is {len(draws)}, but there are {world_size} workers and each needs an "
            f"image: give at most {len(draws)} workers, or a batch_size of at least {world_size}"
        )
    return tuple(draws[rank::world_size])


def _draw(indices: Sequence[int], seed: int, place: int) -> Draw:
    epoch, entry = divmod(place, len(indices))
    order = _permutation(seed, epoch, len(indices))
    words = np.random.SeedSequence(seed, spawn_key=(_AUGMENTATION, place))
    return Draw(int(indices[order[entry]]), int(words.generate_state(1, np.uint64)[0]))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.intp]:
    """The order (length,) in which an epoch goes through the list. Kept: many steps share it."""
    words = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
    keys = np.random.PCG64(words).random_raw(length)
    order: NDArray[np.intp] = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order
