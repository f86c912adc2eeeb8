"""The scripts that measure a driver run, and find in what was written all that they look for."""

from __future__ import annotations

import pytest

from tests.scale import ending, planning

PHOTOS = 2000


@pytest.mark.slow
def test_planning_is_measured_and_what_it_planned_is_each_image_once() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "")  # restored afterwards, whatever the stub's are
        with planning.stub_environment():
            rows = {row["step"]: row for row in planning.all_steps(PHOTOS, planning.STEPS[1:])}
    assert list(rows) == ["plan", "labelled", "only_new", "resume"]
    assert all(row["cpu_minutes"] > 0 for row in rows.values())
    # an image of the plan takes some 30 bytes: it is not repeated, and not all of it is elsewhere
    assert 10 < rows["plan"]["plan_mib"] * 2**20 / PHOTOS < 200
    assert rows["only_new"]["plan_mib"] < rows["plan"]["plan_mib"] / 10


@pytest.mark.slow
def test_ending_is_measured_and_what_it_wrote_is_counted() -> None:
    [row] = ending.all_steps(PHOTOS, ("end",))
    assert row["peak_mib"] > 100
    assert row["written_mib"] > 0
