"""The learning rate schedule, compared with hand-worked values and decimal arithmetic."""

from decimal import Decimal, localcontext

import pytest

from pipeline.train.worker.schedule import poly


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.007),
        (7_500, 0.00540322654706),
        (15_000, 0.00375120711888),
        (22_500, 0.00201022212124),
        (30_000, 0.0),
    ],
)
def test_rates_of_a_published_run_equal_values_worked_by_hand(step, rate):
    assert poly(step, base_lr=0.007, max_steps=30_000, power=0.9) == pytest.approx(rate, rel=1e-11)


@pytest.mark.parametrize(("base_lr", "power"), [("0.001", "0.9"), ("0.05", "2"), ("1", "0.5")])
def test_rates_equal_decimal_arithmetic(base_lr, power):
    with localcontext() as context:
        context.prec = 40
        for step in (0, 1, 17, 333, 995, 996):
            share = 1 - Decimal(step) / Decimal(997)
            expected = Decimal(base_lr) * (share.ln() * Decimal(power)).exp()
            found = poly(step, base_lr=float(base_lr), max_steps=997, power=float(power))
            assert found == pytest.approx(float(expected), rel=1e-14)


def test_the_rate_falls_with_every_step():
    rates = [poly(step, base_lr=0.01, max_steps=50, power=0.9) for step in range(51)]
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.parametrize(
    ("step", "max_steps", "message"),
    [
        (-1, 10, "step -1: must be from 0 to max_steps, 10"),
        (11, 10, "step 11: must be from 0 to max_steps, 10"),
        (0, 0, "max_steps 0: must be at least 1"),
    ],
)
def test_a_step_outside_the_run_is_refused(step, max_steps, message):
    with pytest.raises(ValueError, match=message):
        poly(step, base_lr=0.01, max_steps=max_steps, power=0.9)
