"""Makes the folder `84b697e/`: what that version left on an S3 server, for the tests beside it.

    git worktree add ../before 84b697e        # and an environment in it, as `make test` makes one
    cd ../before && PYTHONPATH=. .venv/bin/python ../here/tests/upgrade/make.py

Run it in a checkout of that version: it imports and starts that version's code alone, and replaces
the folder. The folder is a copy of the prefix `s3://tests/84b697e`, to which the tests upload it
again: URIs and ETags (the MD5 of an object) are then the same everywhere, and no plan and no
identity depends on a machine. Networks and training states are compressed with xz: all channels of
a layer have the same weights, before and after training, so that a state takes 16 KB.

    photos/, labels/    inputs of bulk runs: crops of chelsea.png (by Stefan van der Walt, CC0),
                        astronaut.png (NASA, public domain) and rocket.jpg (SpaceX, public domain)
    killed/             results of a bulk run whose first driver was interrupted, its second killed
    finished/           results of the same run, undisturbed
    planned/            results of a run with --inventory whose driver was killed after planning
    flags.json          the flags of these runs, and run ids that dry runs derived from others
    set/, init...       data set and first weights of training
    trained-killed/     a training run that was killed after the checkpoint of its fourth step
    trained/            what the same version made of a copy of it: the network, and the record
"""

from __future__ import annotations

import importlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def old(module: str) -> Any:
    """A module of the version in the current folder, whatever it is called by now."""
    return importlib.import_module(module)


storage = old("pipeline.data.storage")

VERSION = "84b697e"
PREFIX = f"s3://tests/{VERSION}"
FOLDER = Path(__file__).parent / VERSION
CHECKPOINT = "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"

SEGMENT = """
import os, signal, sys
from jobs import ending, segment
from pipeline.bulk import plan, run
plan.WAVE_SHARDS = 3
count, stop = run._Run._count, os.environ["STOP"]
def stopped(self, summary):
    count(self, summary)
    if stop == "interrupt":
        raise KeyboardInterrupt
    if stop == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
run._Run._count = stopped
if stop == "planned":
    run._Run.to_its_end = lambda self: os.kill(os.getpid(), signal.SIGKILL)
ending.leave(segment.main(sys.argv[1:]))
"""
"""`jobs/segment.py` with short plan parts; $STOP says where its driver ends."""

TRAIN = """
import os, signal, sys, threading, time
from jobs import ending, train
from pipeline.data import storage
def kill_after(uri):
    while not storage.exists(uri):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
if stop := os.environ["STOP"]:
    threading.Thread(target=kill_after, args=(stop,), daemon=True).start()
ending.leave(train.main(sys.argv[1:]))
"""
"""`jobs/train.py`, whose driver is killed as soon as there is an object at $STOP."""

SIZES = ((72, 96), (96, 72), (73, 97), (64, 64))
KINDS = ("JPEG", "PNG", "WEBP", "JPEG", "GIF", "BMP")
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}

BULK = (
    *("--images", f"{PREFIX}/photos", "--labels", f"{PREFIX}/labels"),
    *("--checkpoint", f"{PREFIX}/checkpoint.safetensors", "--cpus-per-actor", "1"),
    *("--shard-images", "2", "--scales", "0.75", "1.0", "--flip"),
)
PLANNED = (
    *("--inventory", f"{PREFIX}/inventory.csv", "--only-new", "--model-changed", "reprocess"),
    *("--limit", "4"),
)
COMMON = (*BULK[:2], *BULK[4:6])
RUN_IDS = (
    (),
    ("--labels", f"{PREFIX}/labels"),
    ("--only-new",),
    ("--only-new", "--model-changed", "new-only"),
    ("--inventory", f"{PREFIX}/inventory.csv"),
    ("--include", "*.png", "*.jpg", "--limit", "3"),
    ("--shard-images", "5", "--shard-bytes", "100000"),
    ("--scales", "0.5", "1", "--flip", "--output-stride", "8"),
    ("--window", "513", "--window-overlap", "65", "--window-above", "1000000"),
    ("--max-pixels", "50000000", "--max-object-bytes", "1000000"),
)

NAMES = '{"names": ["red", "green", "blue", "never"]}'
COLORS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]], dtype=np.uint8)
TRAINING = (
    *("--recipe", "camvid-mobilenetv2", "--data", f"{PREFIX}/set"),
    *("--init", f"{PREFIX}/init.safetensors", "--num-classes", "4", "--classes", NAMES),
    *("--atrous-rates", "--no-image-pooling", "--no-decoder", "--num-convs", "0"),
    *("--dropout", "0", "--crop-size", "33", "35", "--late-crop-size", "None"),
    *("--max-steps", "12", "--batch-size", "4", "--base-lr", "0.01", "--bn-momentum", "0.1"),
    *("--ema-decay", "0.8", "--hard-share", "1", "--no-bf16"),
    *("--eval-every", "4", "--eval-scales", "1", "--no-eval-flip"),
    *("--checkpoint-every", "4", "--loaders", "0", "--cpus-per-worker", "1"),
)


def encoded(pixels: Any, kind: str) -> bytes:
    """An array or an image of Pillow as a file of that kind."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **({"quality": 90} if kind in ("JPEG", "WEBP") else {}))
    return buffer.getvalue()


def put_images(count: int = 18) -> None:
    """Images in five formats, most with a label; two broken ones, one broken label, one note."""
    found = old("jobs.demo.photos").photos()
    originals = [
        (Image.open(io.BytesIO(found[name])).convert("RGB"), Path(f"jobs/demo/labels/{label}.png"))
        for name, label in (
            *(("chelsea.png", "chelsea"), ("astronaut.png", "astronaut")),
            ("rocket.jpg", "rocket"),
        )
    ]
    first = b""
    for number in range(count):
        original, label = originals[number % 3]
        height, width = SIZES[number % len(SIZES)]
        kind = KINDS[number % len(KINDS)]
        box = (11 * number, 7 * number, original.width - 3 * number, original.height - 5 * number)
        size = (width, height)
        data = encoded(original.resize(size, Image.Resampling.BICUBIC, box=box), kind)
        first = first or data
        name = f"{number % 2}/{number:02d}"
        storage.write(f"{PREFIX}/photos/{name}.{ENDINGS[kind]}", data)
        if number % 7 != 6:
            ids = Image.open(label).resize(size, Image.Resampling.NEAREST, box=box)
            ids = ids.crop((0, 0, width - 1, height)) if number == 9 else ids
            storage.write(f"{PREFIX}/labels/{name}.png", encoded(ids, "PNG"))
    storage.write(f"{PREFIX}/photos/broken/empty.jpg", b"")
    storage.write(f"{PREFIX}/photos/broken/truncated.jpg", first[: len(first) // 2])
    storage.write(f"{PREFIX}/photos/notes.txt", b"not a photo")
    rows = [f"{each.uri},{each.etag},{each.size}" for each in listed("photos")]
    table = "\n".join(["uri,etag,size", *sorted(rows), ""])
    storage.write(f"{PREFIX}/inventory.csv", table.encode())


def put_set() -> None:
    """Six training images and three of val: colored regions."""
    for split, numbers in (("train", range(6)), ("val", range(10, 13))):
        for number in numbers:
            generator = np.random.default_rng(number)
            label = np.zeros((41 + number, 53 + 2 * number), dtype=np.uint8)
            label[:20] = 1
            label[12:, 26:] = 2
            label = np.roll(label, 7 * number, axis=1)
            noise = generator.integers(-30, 30, (*label.shape, 3))
            image = np.clip(COLORS[label].astype(int) + noise, 0, 255).astype(np.uint8)
            label[:2] = 255
            below = f"{PREFIX}/set/{split}"
            storage.write(f"{below}/images/{number:02d}.jpg", encoded(image, "JPEG"))
            storage.write(f"{below}/labels/{number:02d}.png", encoded(label, "PNG"))


def put_init() -> None:
    """A network each of whose layers has one filter, in all channels: so it stays, and is small.

    The channels get the same gradients, but for the classes' last layer.
    """
    config = old("pipeline.model.config").ModelConfig(
        backbone="mobilenet_v2",
        style="torchvision",
        num_classes=4,
        multi_grid=(1, 1, 1),
        atrous_rates=(),
        image_pooling=False,
        num_convs=0,
        dropout=0.0,
    )
    model = old("pipeline.model.deeplab").DeepLabV3(config)
    with torch.no_grad():
        for index, weight in enumerate(each for each in model.parameters() if each.ndim == 4):
            outputs, inputs, height, width = weight.shape
            shape = (1, inputs if inputs == 3 else 1, height, width)
            filters = torch.rand(shape, generator=torch.Generator().manual_seed(index)) + 0.5
            weight.copy_((filters / (inputs * height * width)).expand_as(weight))
            if outputs == config.num_classes:
                weight.copy_(torch.linspace(-0.01, 0.01, outputs)[:, None, None, None])
    classes = old("pipeline.data.labels").Classes.from_dict(json.loads(NAMES))
    data = old("pipeline.model.weights").to_bytes(model, classes)
    storage.write(f"{PREFIX}/init.safetensors", data)


def run(code: str, *flags: str, stop: str = "") -> str:
    """Run the code with the flags on a Ray of its own; return the last line that it prints."""
    environment = {**os.environ, "STOP": stop, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    wanted = {"": 0, "interrupt": 1}.get(stop, -9)
    assert done.returncode == wanted, f"{flags}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout.strip().rpartition("\n")[2]


def listed(place: str) -> list[Any]:
    """The objects below a folder of the prefix."""
    return list(storage.list_objects(f"{PREFIX}/{place}"))


def segment() -> None:
    """Bulk runs."""
    killed = (*BULK, "--results", f"{PREFIX}/killed")
    run(SEGMENT, *killed, stop="interrupt")
    run(SEGMENT, *killed, stop="kill")
    run(SEGMENT, *BULK, "--results", f"{PREFIX}/finished")
    run(SEGMENT, *BULK, *PLANNED, "--results", f"{PREFIX}/planned", stop="planned")
    images = {place: len(listed(f"{place}/images")) for place in ("killed", "finished")}
    assert 3 <= images["killed"] < images["finished"] == 10, images
    assert listed("killed/usage")
    assert listed("killed/leases")


def run_ids() -> dict[str, str]:
    """Flags, as one line, and the run id of a dry run with them; its date is today's."""
    found = {}
    for flags in RUN_IDS:
        dry = ("--results", f"{PREFIX}/none", "--dry-run", "--calibration-images", "0")
        last = run(SEGMENT, *COMMON, *flags, *dry)
        [found[" ".join(flags)]] = [word[4:] for word in last.split() if word.startswith("run=")]
    return found


def train() -> None:
    """Training runs."""
    fourth = "checkpoints/step-00000004/state.safetensors"
    killed = f"{PREFIX}/trained-killed"
    run(TRAIN, *TRAINING, "--out", killed, stop=f"{killed}/{fourth}")
    states = [each.uri for each in listed("trained-killed/checkpoints")]
    assert [each for each in states if each.endswith("state.safetensors")] == [f"{killed}/{fourth}"]
    for each in listed("trained-killed"):
        if not each.uri.endswith("lease.json"):
            name = storage.relative(killed, each.uri)
            storage.write(f"{PREFIX}/trained/{name}", storage.read(each.uri))
    run(TRAIN, *TRAINING, "--out", f"{PREFIX}/trained")


def fetch() -> None:
    """Replaces the folder by what is at the prefix, without what the tests do not need."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    kept = ("run.json", "record.json", "model.safetensors")
    for each in storage.list_objects(PREFIX):
        name = storage.relative(PREFIX, each.uri)
        if name == "checkpoint.safetensors":
            continue
        if name.startswith("trained/") and name.removeprefix("trained/") not in kept:
            continue
        data = storage.read(each.uri)
        if "lease" in name:
            data = json.dumps({**json.loads(data), "host": "a-host", "boot": "a-boot"}).encode()
        path = FOLDER / name
        if name.endswith(".safetensors"):
            path, data = path.with_name(f"{path.name}.xz"), lzma.compress(data, preset=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def main() -> None:
    """Makes the folder."""
    s3_server = old("jobs.demo.server").s3_server
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server(Path(folder), buckets=("tests",)) as variables,
    ):
        os.environ.update(variables)
        storage.write(f"{PREFIX}/checkpoint.safetensors", Path(CHECKPOINT).read_bytes())
        put_images()
        put_set()
        put_init()
        segment()
        train()
        fetch()
        flags: dict[str, Any] = {"bulk": BULK, "planned": PLANNED, "training": TRAINING}
        flags |= {"common": COMMON, "run_ids": run_ids()}
        (FOLDER / "flags.json").write_text(json.dumps(flags, indent=1) + "\n")


if __name__ == "__main__":
    main()
