"""Loaded by every Python that a run under fault injection starts (its folder is on PYTHONPATH).

The product knows nothing of it. It wraps the functions that are a run's stages, as their modules
are imported, so that a test can have a process wait at a named place to be killed there, and so
that crafted images do to their process what they say. What is armed lies as files in the folder
`$FAULTS`: `armed/STAGE.PLACE` is claimed by the first process that comes by, by renaming it to
`claimed/STAGE.PLACE.PID`; nothing is inferred while there is a `gate`, and what is raises while
there is a `bug`. `loads` lists the processes that loaded a model, `poisoned` those that an image
did something to.
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections import Counter

FOLDER = os.environ.get("FAULTS")

STAGES = {
    "load": ("pipeline.model.weights", "load"),
    "plan": ("pipeline.bulk.planning.plan", "make"),
    "fetch": ("pipeline.bulk.worker.load", "Loader._fetch"),
    "decode": (
        "pipeline.bulk.worker.decode",
        "DecoderPool.image",
    ),  # the actor, waiting for its child
    "decoder": ("pipeline.data.images", "decode"),  # the child itself
    "infer": ("pipeline.model.predict", "segment"),
    "create": ("pipeline.data.storage", "create"),
    "reconcile": ("pipeline.bulk.driver.reconcile", "Reconciler._missing"),
    "classes": ("pipeline.bulk.driver.finalize", "RunFinalizer.write_classes"),
    "done": ("pipeline.bulk.driver.finalize", "RunFinalizer.write_done"),
    "record": ("pipeline.bulk.driver.finalize", "RunFinalizer.write_record"),
}
PLACES = ("begin", "amid", "end")
_WAIT_S = 60.0

counts = Counter()


def _note(what):
    """Adds this process's id to the list `what`."""
    if not os.path.isdir(FOLDER):  # nobody asks
        return
    with open(f"{FOLDER}/{what}", "a") as file:
        file.write(f"{os.getpid()}\n")


def _crash(_data):
    os.kill(os.getpid(), signal.SIGSEGV)


def _eat(_data):
    eaten = []
    while True:
        eaten.append(bytearray(64 << 20))


def _hang(_data):
    while True:
        time.sleep(1)


def _devour():
    """Eats so much and no more: what does not kill it by then will not."""
    eaten = []
    for _ in range(GREED_BYTES // _GREED_STEP):
        eaten.append(b"\1" * _GREED_STEP)
        time.sleep(0.05)  # who watches the node's memory looks ten times a second
    time.sleep(_WAIT_S)


POISON = {b"faults:crash": _crash, b"faults:eat": _eat, b"faults:hang": _hang}
"""What a decoder does with an image that holds these bytes."""

DEADLY = (255, 0, 254, 1, 2, 3)
"""The first two pixels of an image whose inference kills its process."""

GREEDY = (255, 0, 254, 1, 2, 4)
"""The first two pixels of an image whose inference eats memory until its process is killed."""

GREED_BYTES = 8 << 30
_GREED_STEP = 256 << 20


def _poisoned(stage, arguments):
    if stage == "decoder":
        for marker, act in POISON.items():
            if marker in arguments[0]:
                _note("poisoned")
                act(arguments[0])
    elif stage == "load":
        _note("loads")
    elif stage == "infer":
        while os.path.exists(f"{FOLDER}/gate"):
            time.sleep(0.1)
        if os.path.exists(f"{FOLDER}/bug"):
            raise RuntimeError("a bug that was put here")
        images = arguments[1]
        if any(tuple(image.reshape(-1)[:6]) == DEADLY for image in images):
            _note("poisoned")
            os.kill(os.getpid(), signal.SIGKILL)
        if any(tuple(image.reshape(-1)[:6]) == GREEDY for image in images):
            _note("poisoned")
            _devour()


def _claimed(stage, place):
    """Whether this process is the one to be killed there, where one was asked for."""
    try:
        os.rename(
            f"{FOLDER}/armed/{stage}.{place}", f"{FOLDER}/claimed/{stage}.{place}.{os.getpid()}"
        )
    except OSError:
        return False
    return True


def _wrapped(stage, function):
    @functools.wraps(function)
    def at_stage(*arguments, **named):
        if stage == "create" and "/images/" not in arguments[0]:
            return function(*arguments, **named)
        _poisoned(stage, arguments)
        if stage == "decoder" and not counts[stage]:
            counts[stage] += 1  # it may hold an image whose decoder was just killed: two condemn
            return function(*arguments, **named)
        if _claimed(stage, "begin"):
            time.sleep(_WAIT_S)
        amid = _claimed(stage, "amid")
        try:
            return function(*arguments, **named)
        finally:
            if amid or _claimed(stage, "end"):  # who was to be hit amid was quicker than that
                time.sleep(_WAIT_S)

    return at_stage


def _wrap(module):
    for stage, (name, path) in STAGES.items():
        if name == module.__name__:
            *owners, function = path.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, function, _wrapped(stage, getattr(owner, function)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the stages' modules as they would be found, and wraps them once they are loaded."""

    def find_spec(self, name, path=None, target=None):
        if name not in {module for module, _ in STAGES.values()}:
            return None
        others = (each for each in sys.meta_path if each is not self)
        specs = (each.find_spec(name, path, target) for each in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_wrap(module):
                load(module)
                _wrap(module)

            spec.loader.exec_module = load_and_wrap
        return spec


if FOLDER:
    sys.meta_path.insert(0, _Finder())
