"""Sampler: what is in a batch depends on seed and step, never on workers or on the past."""

import time
from collections import Counter

import pytest

from pipeline.train.worker.sampler import Draw, batch, share

PHOTOS = [3, 1, 4, 15, 9, 2, 6]
REPEATED = [*PHOTOS, 15, 2]


def run(indices, *, steps, seed=5, batch_size=4):
    """The draws of the first steps, one after another."""
    return [
        draw
        for step in range(steps)
        for draw in batch(indices, seed=seed, step=step, batch_size=batch_size)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9, 20])
def test_an_epoch_holds_each_entry_of_the_list_exactly_once(batch_size):
    drawn = run(REPEATED, steps=60, batch_size=batch_size)
    for epoch in range(60 * batch_size // len(REPEATED)):
        one = drawn[epoch * len(REPEATED) : (epoch + 1) * len(REPEATED)]
        assert Counter(draw.index for draw in one) == Counter(REPEATED)


@pytest.mark.parametrize("batch_size", [4, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_workers_share_one_batch_whatever_their_number(world_size, batch_size):
    for step in (0, 1, 2, 1000):
        whole = batch(PHOTOS, seed=5, step=step, batch_size=batch_size)
        shares = [share(whole, rank, world_size) for rank in range(world_size)]
        assert Counter(draw for part in shares for draw in part) == Counter(whole)
        sizes = [len(part) for part in shares]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_a_step_is_the_same_in_any_order_and_after_any_other():
    forwards = [batch(PHOTOS, seed=5, step=step, batch_size=4) for step in range(40)]
    for step in reversed(range(40)):
        batch(REPEATED, seed=8, step=step + 3, batch_size=5)
        assert batch(PHOTOS, seed=5, step=step, batch_size=4) == forwards[step]


def test_a_step_far_ahead_is_reached_at_once():
    began = time.process_time()
    far = batch(range(10_582), seed=0, step=1_000_000, batch_size=16)
    # replaying would be 16 million draws, minutes of them
    assert time.process_time() - began < 1
    assert len({draw.index for draw in far}) == 16


def test_epochs_and_seeds_give_other_orders():
    orders = {
        (seed, epoch): tuple(
            draw.index for draw in batch(range(50), seed=seed, step=epoch, batch_size=50)
        )
        for seed in (0, 1, 2**64)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)


def test_a_photo_drawn_again_is_augmented_otherwise():
    seeds = [draw.seed for draw in run(REPEATED, steps=500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seeds != [draw.seed for draw in run(REPEATED, steps=500, seed=6)]


def test_every_entry_comes_first_about_as_often_as_any_other():
    firsts = Counter(
        batch(range(6), seed=2, step=step, batch_size=6)[0].index for step in range(3000)
    )
    # 500 each; five standard deviations are 102
    assert all(abs(firsts[index] - 500) < 102 for index in range(6))


def test_a_list_shorter_than_the_batch_is_begun_anew():
    drawn = batch([8, 9], seed=1, step=0, batch_size=5)
    assert sorted(draw.index for draw in drawn[:2]) == [8, 9]
    assert sorted(draw.index for draw in drawn[2:4]) == [8, 9]


def test_a_tiny_run_stays_as_it_was_written_down():
    # A change here means that resumed runs go on with other photos than they began with.
    assert run([10, 11, 12, 12], seed=7, steps=2, batch_size=3) == [
        Draw(12, 23751027488930731),
        Draw(11, 357518433231647923),
        Draw(10, 10549271650533257363),
        Draw(12, 9803347940192238913),
        Draw(12, 15373924171081389242),
        Draw(12, 3498968919694070685),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": []}, "indices is empty"),
        ({"step": -1}, "step is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_batch_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch(**{"indices": PHOTOS, "seed": 0, "step": 0, "batch_size": 4, **arguments})


def test_more_workers_than_images_are_refused_with_the_way_out():
    whole = batch(PHOTOS, seed=5, step=0, batch_size=3)
    with pytest.raises(ValueError, match=r"batch_size is 3.*4 workers.*at most 3 .*at least 4"):
        share(whole, 0, 4)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}; with a world size of 2"):
        share(batch(PHOTOS, seed=5, step=0, batch_size=4), rank, 2)
