"""The driver benchmarks run, and find the results that they check for."""

from __future__ import annotations

import pytest

from tests.scale import ending, planning

IMAGES = 2000


@pytest.mark.slow
def test_planning_is_measured_and_plans_each_image_once() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "")  # so that they are restored after the stub sets them
        with planning.stub_environment():
            rows = {row["step"]: row for row in planning.all_steps(IMAGES, planning.STEPS[1:])}
    assert list(rows) == ["plan", "labelled", "only_new", "resume"]
    assert all(row["cpu_minutes"] > 0 for row in rows.values())
    # an image takes about 30 bytes in the plan
    assert 10 < rows["plan"]["plan_mib"] * 2**20 / IMAGES < 200
    assert rows["only_new"]["plan_mib"] < rows["plan"]["plan_mib"] / 10


@pytest.mark.slow
def test_finalization_is_measured_and_its_rows_are_counted() -> None:
    [row] = ending.all_steps(IMAGES, ("end",))
    assert row["peak_mib"] > 100
    assert row["written_mib"] > 0
