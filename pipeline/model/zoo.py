"""Public weight files by name: fetched on first use, kept in a cache, checked each time.

`zoo:resnet50` is a name that `weights.load` and `load_backbone` take in place of a URI. Enters:
a name. Leaves: the path of a file whose sha256 begins as the published file's name says. The
cache is `$DEEPLAB_CACHE`, or `~/.cache/deeplab-pipeline`; a file put there by hand serves too.
"""

import contextlib
import hashlib
import http.client
import logging
import os
import tempfile
import urllib.request
from pathlib import Path

from pipeline.data.storage import StorageError
from pipeline.model.formats import CheckpointError
from pipeline.text import one_line

logger = logging.getLogger(__name__)

SCHEME = "zoo:"
CACHE_VARIABLE = "DEEPLAB_CACHE"

HOST = "https://download.pytorch.org/models/"
TIMEOUT_S = 30.0
"""For each answer of the host, not for the whole file."""

FILES = (
    # DeepLabv3 with its auxiliary head, trained on COCO with VOC's 21 classes
    "deeplabv3_resnet50_coco-cd0a2569.pth",
    "deeplabv3_resnet101_coco-586e9e4e.pth",
    # ImageNet backbones, for load_backbone
    "resnet18-f37072fd.pth",
    "resnet34-b627a593.pth",
    "resnet50-0676ba61.pth",
    "resnet101-63fe2227.pth",
    "mobilenet_v2-b0353104.pth",
)
"""name-XXXXXXXX.pth, where X are the first digits of the file's sha256."""

_CHUNK_BYTES = 1 << 20


def resolve(uri: str) -> str:
    """The local path of `zoo:NAME`, fetched where need be; any other URI as it is."""
    return str(fetch(uri.removeprefix(SCHEME))) if uri.startswith(SCHEME) else uri


def fetch(name: str) -> Path:
    """The path of the public file `name` in the cache, downloaded on first use.

    Raises ValueError where no file has that name, StorageError where it cannot be fetched,
    CheckpointError where it is not the published file; it is deleted then.
    """
    file = _file(name)
    path = cache_folder() / file
    try:
        if path.exists():
            _check(path, file, of=str(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(HOST + file, path)
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(
            "access",
            f"{HOST}{file} cannot be fetched ({type(error).__name__}: {one_line(error)}); without "
            f"a network, fetch it elsewhere and put it at {path} (${CACHE_VARIABLE} is its folder)",
        ) from None
    return path


def cache_folder() -> Path:
    """The folder of fetched files: `$DEEPLAB_CACHE`, or one below the user's `~/.cache`."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).absolute() if given else Path.home() / ".cache" / "deeplab-pipeline"


def _file(name: str) -> str:
    known = {file.rpartition("-")[0]: file for file in FILES}
    if name not in known:
        raise ValueError(f"no public weight file is called {name!r}; known are {', '.join(known)}")
    return known[name]


def _download(url: str, path: Path) -> None:
    """Puts the file at `path`, whole and checked, or not at all."""
    logger.warning("%s is fetched into %s", url, path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "deeplab-pipeline"})
        with (
            os.fdopen(handle, "wb") as out,
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer,
        ):
            while chunk := answer.read(_CHUNK_BYTES):
                out.write(chunk)
        _check(Path(temporary), path.name, of=f"what {url} sent")
        os.chmod(temporary, 0o644)  # a cache may be shared
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _check(path: Path, file: str, *, of: str) -> None:
    digits = file.rpartition("-")[2].partition(".")[0]
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if not found.startswith(digits):
        path.unlink()
        raise CheckpointError(
            f"{of} is not the published {file}: its sha256 begins with {found[: len(digits)]}; "
            "it is deleted: run again, or put a whole copy there by hand"
        )
