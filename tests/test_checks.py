"""Checks of single values, and text on one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from pipeline import checks, text


def test_a_flag_is_its_field_with_dashes() -> None:
    assert checks.flag("max_steps") == "--max-steps"


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (checks.check_at_least, (0, 1), "--x 0: must be at least 1"),
        (checks.check_at_least, (0.5, 1, "0 is off"), "--x 0.5: must be at least 1; 0 is off"),
        (checks.check_at_least, (math.nan, 1), "--x nan: must be at least 1"),
        (checks.check_integer, (9, 2, 8), "--x 9: must be an integer from 2 to 8"),
        (checks.check_integer, (2.0, 2, 8), "--x 2.0: must be an integer from 2 to 8"),
        (
            checks.check_integer,
            (True, 0, 8, "why"),
            "--x True: must be an integer from 0 to 8; why",
        ),
        (checks.check_choice, ("c", ("a", "b")), "--x 'c': must be one of a, b"),
        (checks.check_choice, (8.0, (8, 16)), "--x 8.0: must be one of 8, 16"),
        (checks.check_choice, (1, (True, False)), "--x 1: must be one of True, False"),
        (checks.check_positive_integers, ([1],), "--x [1]: must be a tuple of positive integers"),
        (checks.check_positive_integers, ((0,),), "--x (0,): must be a tuple of positive integers"),
        (checks.check_fraction, (1.0, "0 is off"), "--x 1.0: must be in [0, 1); 0 is off"),
        (checks.check_fraction, (math.nan,), "--x nan: must be in [0, 1)"),
    ],
)
def test_an_invalid_value_is_refused_with_the_rule(
    check: Callable[..., None], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=r"--x") as error:
        check("--x", *arguments)
    assert str(error.value) == message


def test_values_within_the_rules_pass() -> None:
    checks.check_at_least("x", None, 1)
    checks.check_at_least("x", 1, 1)
    checks.check_integer("x", 8, 2, 8)
    checks.check_choice("x", 16, (8, 16))
    checks.check_positive_integers("x", ())
    checks.check_fraction("x", 0)
    checks.check_pixel_statistics((0, 0.5, 1), (0.1, 0.2, 1))


def test_text_is_one_printable_line_of_limited_length() -> None:
    assert text.one_line(" a\n\tb\x1b[0m ") == "a b\\x1b[0m"
    assert text.one_line("x" * 9, limit=4) == "xxx…"


def test_lines_of_an_error_fall_back_to_its_class() -> None:
    error = ValueError("first\nmiddle\nlast\n")
    assert (text.first_line(error), text.last_line(error)) == ("first", "last")
    assert text.first_line(KeyError()) == text.last_line(KeyError()) == "KeyError"


def test_only_the_first_names_are_listed_with_the_number_of_others() -> None:
    assert text.first_names([]) == ""
    assert text.first_names(["a", "b", "c"]) == "a, b, c"
    assert text.first_names(["a", "b", "c", "d"], limit=2) == "a, b and 2 more"
