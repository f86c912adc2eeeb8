"""The sampler: a batch depends on seed and step, not on workers or earlier steps."""

import time
from collections import Counter

import pytest

from pipeline.train.worker.sampler import Draw, draw_batch, worker_draws

IMAGES = [3, 1, 4, 15, 9, 2, 6]
REPEATED = [*IMAGES, 15, 2]


def run(indices, *, steps, seed=5, batch_size=4):
    """Return the draws of the first steps, one after another."""
    return [
        draw
        for step in range(steps)
        for draw in draw_batch(indices, seed=seed, step=step, batch_size=batch_size)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9, 20])
def test_an_epoch_has_each_entry_of_the_list_exactly_once(batch_size):
    drawn = run(REPEATED, steps=60, batch_size=batch_size)
    for epoch in range(60 * batch_size // len(REPEATED)):
        entries = drawn[epoch * len(REPEATED) : (epoch + 1) * len(REPEATED)]
        assert Counter(draw.index for draw in entries) == Counter(REPEATED)


@pytest.mark.parametrize("batch_size", [4, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_parts_of_any_number_of_workers_are_a_partition_of_the_batch(world_size, batch_size):
    for step in (0, 1, 2, 1000):
        whole = draw_batch(IMAGES, seed=5, step=step, batch_size=batch_size)
        parts = [worker_draws(whole, rank, world_size) for rank in range(world_size)]
        assert Counter(draw for part in parts for draw in part) == Counter(whole)
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_does_not_depend_on_the_order_of_calls():
    forwards = [draw_batch(IMAGES, seed=5, step=step, batch_size=4) for step in range(40)]
    for step in reversed(range(40)):
        draw_batch(REPEATED, seed=8, step=step + 3, batch_size=5)
        assert draw_batch(IMAGES, seed=5, step=step, batch_size=4) == forwards[step]


def test_a_late_step_takes_no_longer_than_the_first():
    start = time.process_time()
    far = draw_batch(range(10_582), seed=0, step=1_000_000, batch_size=16)
    # drawing all earlier batches would take minutes
    assert time.process_time() - start < 1
    assert len({draw.index for draw in far}) == 16


def test_each_epoch_and_seed_has_its_own_order():
    orders = {
        (seed, epoch): tuple(
            draw.index for draw in draw_batch(range(50), seed=seed, step=epoch, batch_size=50)
        )
        for seed in (0, 1, 2**64)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)


def test_every_draw_has_its_own_augmentation_seed():
    seeds = [draw.seed for draw in run(REPEATED, steps=500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seeds != [draw.seed for draw in run(REPEATED, steps=500, seed=6)]


def test_every_entry_is_first_about_equally_often():
    firsts = Counter(
        draw_batch(range(6), seed=2, step=step, batch_size=6)[0].index for step in range(3000)
    )
    # 500 each; five standard deviations are 102
    assert all(abs(firsts[index] - 500) < 102 for index in range(6))


def test_a_list_shorter_than_the_batch_starts_over():
    drawn = draw_batch([8, 9], seed=1, step=0, batch_size=5)
    assert sorted(draw.index for draw in drawn[:2]) == [8, 9]
    assert sorted(draw.index for draw in drawn[2:4]) == [8, 9]


def test_the_draws_of_a_small_run_equal_stored_ones():
    # A change here means that runs resumed after an upgrade get other images.
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
        ({"step": -1}, "step -1: must be at least 0"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
    ],
)
def test_invalid_arguments_of_a_batch_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_batch(**{"indices": IMAGES, "seed": 0, "step": 0, "batch_size": 4, **arguments})


def test_more_workers_than_images_are_refused():
    whole = draw_batch(IMAGES, seed=5, step=0, batch_size=3)
    with pytest.raises(ValueError, match=r"batch_size 3: .*4 workers.*at most 3 .*at least 4"):
        worker_draws(whole, 0, 4)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_group_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank}: must be from 0 to 1"):
        worker_draws(draw_batch(IMAGES, seed=5, step=0, batch_size=4), rank, 2)
