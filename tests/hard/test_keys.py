"""Hostile keys: each image has one row with its own pixels, and nothing is written elsewhere.

The server is moto, which accepts every key that S3 accepts, unlike others. Keys are put into its
memory without our code; the images differ in height, to show whether the right one was read.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from PIL import Image

from jobs import query
from pipeline.bulk.driver.finalize import RunFinalizer
from pipeline.bulk.planning import plan
from pipeline.bulk.settings import BulkSettings, fingerprint
from pipeline.bulk.worker.segmenter import Segmenter, WorkerContext
from pipeline.bulk.worker.shard_worker import images_of
from pipeline.data import storage
from pipeline.data.storage import s3
from pipeline.model.weights import checkpoint_fingerprint
from pipeline.results.layout import RunLayout
from pipeline.results.query import connect
from tests.small_images import DEMO, encode

CHECKPOINT = str(DEMO / "tfzoo-voc-mobilenetv2.safetensors")
PREFIX = "images/night"

KEYS = [
    *("../x.jpg", "../../../tmp/x.jpg", "a/../x.jpg", "./x.jpg", "x.jpg/..", "..", "/x.jpg"),
    *("a//x.jpg", "//x.jpg", "x.jpg/", "%2e%2e/x.jpg", "%2e%2e%2fx.jpg", "%00.jpg", "%.jpg"),
    *("nul\0.jpg", "new\nline.jpg", "cr\r.jpg", "tab\t.jpg", "esc\x1b[31m.jpg", "\x7f.jpg"),
    *("\x9b31m.jpg", "\u202egpj.exe", "\u2028.jpg", "🐱.jpg", "é.jpg", "e\u0301.jpg", "猫.jpg"),
    *("\"quotes\" and 'quotes'.jpg", "<script>alert(1)</script>.jpg", "&amp;&lt;.jpg", "]]>.jpg"),
    *("[red]rich[/red].jpg", "=1+1.jpg", "+1.jpg", "-1.jpg", "@x.jpg", "a+b c&d=e?f#g.jpg"),
    *("back\\slash.jpg", "..\\x.jpg", "*?[x].jpg", "$HOME.jpg", "`id`.jpg", " .jpg ", ";--.jpg"),
    *("C:\\x.jpg", "~/x.jpg", "-rf.jpg", "{}.jpg", "s3://other/x.jpg", "file:///etc/x.jpg"),
]
NOT_SERVED = "new\nline.jpg"
"""moto lists this key but cannot serve it: its row must be an error."""

KEYS.append("k" * (1024 - len(PREFIX) - 1 - 4) + ".jpg")


@pytest.fixture(scope="module")
def moto() -> Iterator[Any]:
    """The backend of a moto server that storage uses: a dictionary of keys and bytes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "thing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        s3.filesystem.cache_clear()
        s3.retrying_filesystem.cache_clear()
        backend = s3_backends["123456789012"]["global"]
        for name in ("hostile", "results"):
            backend.create_bucket(name, "us-east-1")
        for number, key in enumerate(KEYS):
            image = Image.new("RGB", (33, 20 + number), (number, 90, 200))
            backend.put_object("hostile", f"{PREFIX}/{key}", encode(image, "PNG"))
        # code that normalizes `../x.jpg` would read, or match as a label, one of these
        for key in ("images/x.jpg", "x.jpg", "tmp/x.jpg", "images/x.png", "x.png"):
            backend.put_object("hostile", key, encode(Image.new("RGB", (7, 5)), "PNG"))
        for key in ("../x", "%2e%2e/x", "nul\0", "<script>alert(1)</script>"):
            label = Image.new("L", (33, 20 + KEYS.index(f"{key}.jpg")), 0)
            backend.put_object("hostile", f"labels/{key}.png", encode(label, "PNG"))
        yield backend
    s3.filesystem.cache_clear()
    s3.retrying_filesystem.cache_clear()
    server.stop()


def keys_of(backend: Any, bucket: str) -> set[str]:
    return set(backend.buckets[bucket].keys)


def whole_run(settings: BulkSettings) -> RunLayout:
    """Plan, segment and finalize a run without Ray."""
    model = checkpoint_fingerprint(storage.read(CHECKPOINT))
    layout = RunLayout(results=settings.results, run_id="hostile")
    made = plan.make(settings, layout, settings.identity(model=model))
    work = WorkerContext(
        layout=layout, images=settings.images, checkpoint=CHECKPOINT, model=model,
        settings=fingerprint(asdict(settings.inference)), inference=settings.inference,
        batch_images=1, cpus=1, gpu=False,
    )  # fmt: skip
    segmenter = Segmenter(work)
    try:
        for part in made.parts:
            for row in plan.read_part(layout, part).to_pylist():
                segmenter.segment(row["shard"], images_of(row["images"]))
    finally:
        segmenter.close()
    facts = {"checkpoint": CHECKPOINT, "checkpoint_sha256": "0", "code_version": "1"}
    facts |= {"bytes_read": 1, "seconds": 1.0, "images_per_second": None}
    with RunFinalizer(layout, made, segmenter.classes) as finish:
        finish.write_classes()
        finish.write_done()
        finish.write_record(finish.outcome(), facts)
    return layout


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "s3"])
def test_every_hostile_key_is_one_row_and_is_written_nowhere_else(
    moto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    here = tmp_path / "working" / "folder"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    results = f"{tmp_path}/out/results" if where == "local" else "s3://results/deep/er"
    before = keys_of(moto, "hostile")
    settings = BulkSettings(
        images=f"s3://hostile/{PREFIX}",
        labels="s3://hostile/labels",
        results=results,
        checkpoint=CHECKPOINT,
        include=("*",),
        shard_images=20,
        max_error_fraction=1.0,
    )
    layout = whole_run(settings)
    with connect(results) as con:
        rows = con.execute("select uri, status, height, label_uri, error from images").fetchall()
    wanted = {f"s3://hostile/{PREFIX}/{key}": 20 + i for i, key in enumerate(KEYS)}
    assert sorted(row[0] for row in rows) == sorted(wanted)
    [(not_served, _, _, _, why)] = [row for row in rows if row[1] != "ok"]
    assert not_served == f"s3://hostile/{PREFIX}/{NOT_SERVED}"
    assert why.isprintable()
    assert {row[0]: row[2] for row in rows} == {**wanted, not_served: None}
    labels = {row[3].removeprefix("s3://hostile/labels/") for row in rows if row[3]}
    assert labels == {"../x.png", "%2e%2e/x.png", "nul\0.png", "<script>alert(1)</script>.png"}
    # `done` has the keys unchanged: another run retries only the failed one
    again = BulkSettings(**{**vars(settings), "only_new": True, "run_id": "again"})
    made = plan.make(
        again,
        RunLayout(results=results, run_id="again"),
        again.identity(model=checkpoint_fingerprint(storage.read(CHECKPOINT))),
        write=False,
    )
    assert (made.counts.images, made.counts.done_before) == (1, len(KEYS) - 1)
    assert keys_of(moto, "hostile") == before
    written = {storage.relative(results, item.uri) for item in storage.list_objects(results)}
    assert len(written) == 3 + 1 + 1 + 1 + 2  # shards, classes, done, record, and two of the plan
    assert storage.exists(layout.record)
    if where == "local":
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert {str(path.relative_to(tmp_path / "out" / "results")) for path in files} == written
    else:
        assert keys_of(moto, "results") == {f"deep/er/{name}" for name in written}


@pytest.mark.s3
@pytest.mark.slow
def test_hostile_keys_are_displayed_safely_and_exported_unchanged(
    moto: Any, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    results = str(tmp_path / "results")
    settings = BulkSettings(
        images=f"s3://hostile/{PREFIX}", results=results, checkpoint=CHECKPOINT, include=("*",)
    )
    whole_run(settings)
    uris = sorted(f"s3://hostile/{PREFIX}/{key}" for key in KEYS)
    ask = f"select uri, substr(uri, {len(settings.images) + 2}) as name from images"
    assert query.main([results, ask]) == 0
    table = capfdbinary.readouterr().out.decode()
    assert all(line.isprintable() for line in table.splitlines())
    assert "[red]rich[/red]" in table
    assert query.main([results, ask, "--format", "csv"]) == 0
    text = capfdbinary.readouterr().out.decode()
    [head, *rows] = csv.reader(io.StringIO(text.replace("\0", "\ufffd"), newline=""))
    assert head == ["uri", "name"]
    assert sorted(row[0] for row in rows) == sorted(uri.replace("\0", "\ufffd") for uri in uris)
    assert not any(row[1].startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows)
    assert sum(row[1].startswith(("'=", "'+", "'-", "'@")) for row in rows) == 5
