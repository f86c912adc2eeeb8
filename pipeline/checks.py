"""Validation of single values: each check returns None, or raises ValueError.

A message names the value, the rule and the way out: `--max-steps 0: must be at least 1`. `name` is
what the user gave: a flag (`flag("max_steps")`) or a field of a file. `hint` is appended.
"""

from typing import TypeGuard


def flag(field: str) -> str:
    """Return the command-line flag of a settings field: `max_steps` -> `--max-steps`."""
    return f"--{field.replace('_', '-')}"


def check_at_least(name: str, value: float | None, least: float, hint: str = "") -> None:
    """Check that `value`, if given, is at least `least`."""
    if value is not None and not least <= value:
        raise ValueError(f"{name} {value:g}: must be at least {least:g}{_after(hint)}")


def check_integer(name: str, value: object, lowest: int, highest: int, hint: str = "") -> None:
    """Check that `value` is an integer from `lowest` to `highest`."""
    if not _is_integer(value) or not lowest <= value <= highest:
        raise ValueError(
            f"{name} {value!r}: must be an integer from {lowest} to {highest}{_after(hint)}"
        )


def check_choice(name: str, value: object, allowed: tuple[object, ...], hint: str = "") -> None:
    """Check that `value` is one of `allowed`, and of its type: 8.0 and True are not integers."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"{name} {value!r}: must be one of {choices}{_after(hint)}")


def check_positive_integers(name: str, values: object) -> None:
    """Check that `values` is a tuple of integers of at least 1."""
    if not isinstance(values, tuple) or not all(_is_integer(v) and v > 0 for v in values):
        raise ValueError(f"{name} {values!r}: must be a tuple of positive integers")


def check_fraction(name: str, value: object, hint: str = "") -> None:
    """Check that `value` is a number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} {value!r}: must be in [0, 1){_after(hint)}")


def check_pixel_statistics(mean: object, std: object) -> None:
    """Check that both are three numbers from 0 to 1, and that no `std` is 0."""
    for name, values in (("mean", mean), ("std", std)):
        if not (isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))):
            raise ValueError(f"{name} {values!r}: must be three numbers, one per channel")
        if any(not 0 <= value <= 1 for value in values) or (name == "std" and 0 in values):
            raise ValueError(f"{name} {values!r}: must be on the 0..1 pixel scale; divide by 255?")


def _after(hint: str) -> str:
    return f"; {hint}" if hint else ""


def _is_integer(value: object) -> TypeGuard[int]:
    """Return whether `value` is an int, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
