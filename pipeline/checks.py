"""Checks of single values: each returns nothing, or raises ValueError naming the value and rule.

`name` is what the user gave: a flag (`flag("max_steps")`) or a field of a file.
"""

from typing import TypeGuard


def flag(field: str) -> str:
    """Return the command-line flag of a settings field: `max_steps` -> `--max-steps`."""
    return f"--{field.replace('_', '-')}"


def check_at_least(name: str, value: float | None, least: float, hint: str = "") -> None:
    """Check that `value`, if given, is at least `least`; `hint` is appended to the message."""
    if value is not None and not least <= value:
        raise ValueError(f"{name} {value:g}: must be at least {least:g}{hint and f'; {hint}'}")


def check_integer(name: str, value: object, lowest: int, highest: int, why: str) -> None:
    """That `value` is an integer from `lowest` to `highest`; `why` it has to be is said too."""
    if not _is_integer(value) or not lowest <= value <= highest:
        raise ValueError(
            f"{name} must be an integer from {lowest} to {highest} ({why}), got {value!r}"
        )


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """That `value` is one of `allowed`, and of its type: 8.0 and True are no numbers of ours."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_rates(name: str, rates: object) -> None:
    """That `rates` are a tuple of integers of at least 1."""
    if not isinstance(rates, tuple) or not all(_is_integer(r) and r > 0 for r in rates):
        raise ValueError(f"{name} must be a tuple of positive integers, got {rates!r}")


def check_share(name: str, value: object, way_out: str) -> None:
    """That `value` is a number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}; {way_out}")


def check_pixel_statistics(mean: object, std: object) -> None:
    """That both are three numbers on the scale 0..1, and none of `std` is 0."""
    for name, values in (("mean", mean), ("std", std)):
        if not (isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))):
            raise ValueError(f"{name} must be three numbers, one a channel, got {values!r}")
        if any(not 0 <= value <= 1 for value in values) or (name == "std" and 0 in values):
            raise ValueError(
                f"{name} must be on the 0..1 pixel scale, got {values!r}; divide by 255?"
            )


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
