"""A nightly run without new images among 100,000, through the whole job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.bulk.settings import Inference, fingerprint
from pipeline.model.weights import checkpoint_fingerprint
from tests.scale.planning import put_done, results_of
from tests.scale.stub_s3 import stub_s3

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "jobs" / "demo" / "tfzoo-voc-mobilenetv2.safetensors"
IMAGES = 100_000


@pytest.mark.slow
def test_a_night_without_new_images_of_100_000_takes_under_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stub_s3() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        model = checkpoint_fingerprint(CHECKPOINT.read_bytes())
        put_done(IMAGES, model=model, settings=fingerprint(asdict(Inference())), new_every=0)
        command = [
            *(sys.executable, "jobs/segment.py", "--images", f"s3://images/{IMAGES}"),
            *("--results", results_of(IMAGES), "--checkpoint", str(CHECKPOINT), "--only-new"),
        ]
        started, before = time.monotonic(), os.times().children_user
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds, cpu = time.monotonic() - started, os.times().children_user - before
    assert done.returncode == 0, done.stdout + done.stderr
    *_, words, last = done.stdout.splitlines()
    assert words == "nothing is new: earlier runs processed every image"
    assert " images=0 ok=0 errors=0 label_errors=0 shards=0 " in last
    assert f" done_before={IMAGES} " in last
    print(f"{seconds:.1f} s, {cpu:.1f} CPU s")
    # on a busy machine the CPU time counts: it is the time on an idle core
    assert min(seconds, cpu) < 60
