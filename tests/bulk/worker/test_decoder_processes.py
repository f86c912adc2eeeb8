"""Decoder processes that crash, hang or run out of memory: an error for the image, no other."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.bulk.worker.decode import DecodeError, DecodeLimits, DecoderPool
from pipeline.data.labels import VOC

pytestmark = pytest.mark.process


def _png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


SMALL = _png(5, 7)


@pytest.fixture(scope="module")
def slow() -> bytes:
    """An image of 144 MB of pixels, which takes about half a second to decode."""
    return _png(6000, 8000)


@pytest.fixture(scope="module")
def decoders() -> Iterator[DecoderPool]:
    made = DecoderPool(2, DecodeLimits(max_pixels=50_000_000), VOC)
    yield made
    made.close()


def _made(**limits: float) -> DecoderPool:
    """Return a pool of one warm child with these limits."""
    made = DecoderPool(1, DecodeLimits(**{"max_pixels": 50_000_000, **limits}), VOC)  # type: ignore[arg-type]
    try:
        made.image(SMALL)
    except DecodeError:
        made.close()
        raise
    return made


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _cpu(pid: int) -> int:
    """Return the CPU time that the process has used, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _wait_until_busy(pid: int, before: int) -> None:
    while _cpu(pid) < before + 3:
        time.sleep(0.002)


def _during(pid: int, act: Callable[[], object]) -> threading.Thread:
    """Call `act` once the process is busy: after 30 ms more of CPU time."""
    before = _cpu(pid)

    def watch() -> None:
        _wait_until_busy(pid, before)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it exits while being read
        return False


def _gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _is_alive(pid)


def test_one_crash_is_retried_and_a_second_one_names_the_image(
    slow: bytes,
) -> None:
    made = _made()
    try:
        [first] = made.pids()
        killer = _during(first, lambda: os.kill(first, signal.SIGKILL))
        assert made.image(slow).shape == (6000, 8000, 3)
        killer.join()
        [second] = made.pids()
        assert second != first

        def kill_both() -> None:
            os.kill(second, signal.SIGKILL)
            while (now := made.pids()) == [second]:
                time.sleep(0.002)
            os.kill(now[0], signal.SIGKILL)

        killer = _during(second, kill_both)
        with pytest.raises(DecodeError, match="killed by SIGKILL") as died:
            made.image(slow)
        killer.join()
        assert died.value.kind == "worker_died"
        assert made.image(SMALL).shape == (5, 7, 3)
    finally:
        made.close()


def test_a_child_that_crashed_while_idle_costs_no_image() -> None:
    made = _made()
    try:
        for _ in range(3):
            [pid] = made.pids()
            os.kill(pid, signal.SIGKILL)
            assert _gone_within(pid, 30)
            assert made.image(SMALL).shape == (5, 7, 3)
    finally:
        made.close()


def test_a_hung_child_times_out_at_the_deadline_and_is_replaced() -> None:
    made = _made(deadline_s=4.0)  # long enough for a replacement to start on a busy machine
    try:
        [pid] = made.pids()
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(DecodeError, match="not decoded within 4 s") as late:
            made.image(SMALL)
        assert 3.9 < time.monotonic() - started < 30  # includes the start of a replacement
        assert late.value.kind == "timeout"
        assert not _is_alive(pid)
        assert made.image(SMALL).shape == (5, 7, 3)
    finally:
        made.close()


@pytest.mark.parametrize("large", ["pixels", "file"])
def test_an_image_that_needs_too_much_memory_is_out_of_memory(slow: bytes, large: str) -> None:
    data = slow if large == "pixels" else SMALL + bytes(150_000_000)
    made = _made(memory_bytes=120 * 2**20)
    try:
        with pytest.raises(DecodeError) as too_large:
            made.image(data)
        assert too_large.value.kind == "out_of_memory"
        assert "120 MiB" in str(too_large.value)
        assert made.image(SMALL).shape == (5, 7, 3)
    finally:
        made.close()


def test_descriptors_do_not_leak(decoders: DecoderPool) -> None:
    for data in (SMALL, b"a letter"):
        decoders.image(SMALL)
        before = _descriptors()
        for _ in range(200):
            if data is SMALL:
                decoders.image(data)
            else:
                with pytest.raises(DecodeError):
                    decoders.image(data)
        assert _descriptors() <= before + 1


def test_replaced_children_leave_no_descriptors_or_processes() -> None:
    made = _made()
    before = _descriptors()
    pids = set()
    for _ in range(5):
        [pid] = made.pids()
        pids.add(pid)
        os.kill(pid, signal.SIGKILL)
        assert _gone_within(pid, 30)
        made.image(SMALL)
    assert _descriptors() <= before + 1
    pids.update(made.pids())
    made.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # not even as zombies


def test_many_small_images_in_memory_hold_few_descriptors(decoders: DecoderPool) -> None:
    before = _descriptors()
    held = [decoders.image(SMALL) for _ in range(300)]  # 1024 is a common soft limit
    assert _descriptors() < before + 100
    assert len({pixels.shape for pixels in held}) == 1


_PARENT = """
import io, sys, threading
from PIL import Image
from pipeline.bulk.worker.decode import DecodeLimits, DecoderPool
from pipeline.data.labels import VOC

def png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

def work(data):
    while True:
        made.image(data)

made = DecoderPool(2, DecodeLimits(max_pixels=90_000_000, deadline_s=200), VOC)
for _ in made.pids():  # they take turns, so that each has started
    made.image(png(7, 5))
if sys.argv[1] == "busy":
    large = png(8000, 6000)
print(*made.pids(), flush=True)
if sys.argv[1] == "busy":
    for _ in made.pids():
        threading.Thread(target=work, args=(large,), daemon=True).start()
threading.Event().wait()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_children_end_when_their_parent_is_killed(state: str, tmp_path: Path) -> None:
    log = tmp_path / "stderr"  # of the parent and its children
    with log.open("wb") as stderr:
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, state],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=Path(__file__).parents[3],
        )
    assert parent.stdout is not None
    try:
        with parent.stdout as output:
            pids = [int(pid) for pid in output.readline().split()]
        assert len(pids) == 2
        if state == "busy":
            for pid in pids:
                _wait_until_busy(pid, _cpu(pid))
        parent.kill()
        left = [pid for pid in pids if not _gone_within(pid, 60)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == []
    finally:
        parent.kill()
        # shown if the test fails
        print(f"The parent exited with {parent.wait()}.", log.read_text())


def test_the_child_imports_neither_torch_nor_ray_nor_s3() -> None:
    code = "import sys, pipeline.bulk.worker.decoder_process; print(*sys.modules)"
    listed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    ).stdout.split()
    assert "numpy" in listed
    assert {"torch", "ray", "s3fs", "duckdb", "pyarrow"}.isdisjoint(listed)


def test_modules_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('an image folder is no place for code')")
    monkeypatch.chdir(tmp_path)
    made = _made()
    made.close()
