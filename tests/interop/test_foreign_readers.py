"""Results as other libraries read them: masks in OpenCV, tables in pandas and polars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.data import masks
from tests.results.synthetic_runs import write_run

cv2 = pytest.importorskip("cv2", reason="make interop installs it")
polars = pytest.importorskip("polars", reason="make interop installs it")

pytestmark = pytest.mark.interop


def test_opencv_reads_a_mask_as_class_ids() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (37, 53)).astype(np.uint8)
    found = cv2.imdecode(np.frombuffer(masks.encode(ids), np.uint8), cv2.IMREAD_UNCHANGED)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, ids)


def test_pandas_and_polars_read_the_rows_that_were_written(tmp_path: Path) -> None:
    rows = write_run(str(tmp_path), "r")
    expected = {(row["uri"], row["status"]) for row in rows}
    pattern = f"{tmp_path}/images/run=r/*.parquet"
    found = polars.read_parquet(pattern, hive_partitioning=False)
    assert set(zip(found["uri"], found["status"], strict=True)) == expected
    files = sorted((tmp_path / "images" / "run=r").glob("*.parquet"))
    frame = pd.concat(pd.read_parquet(file, partitioning=None) for file in files)
    assert set(zip(frame["uri"], frame["status"], strict=True)) == expected
    held = [len(each) for each in frame["classes"] if each is not None]
    assert held == [len(row["classes"]) for row in rows if row["classes"] is not None]
