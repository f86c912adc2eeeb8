"""Loaded by every Python that a run under fault injection starts (its folder is on PYTHONPATH).

The product does not know about it. As the modules are imported, it wraps the functions of a run's
stages, so that a test can hold a process at a named point and kill it there, and so that crafted
images crash or block their process. Faults are armed by files in the folder `$FAULTS`: the first
process to reach `armed/STAGE.PLACE` claims it by renaming it to `claimed/STAGE.PLACE.PID`;
inference waits while a file `gate` exists, and raises an exception while a file `bug` exists.
`loads` lists the processes that loaded a model, `poisoned` those that processed a crafted image.
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
    ),  # the actor, waiting for its decoder process
    "decoder": ("pipeline.data.images", "decode"),  # the decoder process itself
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
    """Add this process's id to the list `what`."""
    if not os.path.isdir(FOLDER):  # the test has ended
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
    """Allocate GREED_BYTES, then wait to be killed for it."""
    eaten = []
    for _ in range(GREED_BYTES // _GREED_STEP):
        eaten.append(b"\1" * _GREED_STEP)
        time.sleep(0.05)  # Ray checks the node's memory ten times a second
    time.sleep(_WAIT_S)


POISON = {b"faults:crash": _crash, b"faults:eat": _eat, b"faults:hang": _hang}
"""What a decoder does with an image that holds these bytes."""

DEADLY = (255, 0, 254, 1, 2, 3)
"""The first two pixels of an image whose inference kills its process."""

GREEDY = (255, 0, 254, 1, 2, 4)
"""The first two pixels of an image whose inference allocates memory until it is killed."""

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
            raise RuntimeError("an injected bug")
        images = arguments[1]
        if any(tuple(image.reshape(-1)[:6]) == DEADLY for image in images):
            _note("poisoned")
            os.kill(os.getpid(), signal.SIGKILL)
        if any(tuple(image.reshape(-1)[:6]) == GREEDY for image in images):
            _note("poisoned")
            _devour()


def _claimed(stage, place):
    """Claim the fault armed at this point; return whether this process is now to be killed."""
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
            counts[stage] += 1  # after a second crash, its image would be an error
            return function(*arguments, **named)
        if _claimed(stage, "begin"):
            time.sleep(_WAIT_S)
        amid = _claimed(stage, "amid")
        try:
            return function(*arguments, **named)
        finally:
            if amid or _claimed(stage, "end"):  # it left the stage before the kill
                time.sleep(_WAIT_S)

    return at_stage


def _wrap(module):
    for stage, (name, path) in STAGES.items():
        if name == module.__name__:
            *owners, function = path.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, function, _wrapped(stage, getattr(owner, function)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as usual, and wraps the stages in them once they are loaded."""

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
