"""Public weight files by name: downloaded on first use, cached, and verified on each use.

`weights.load` and `load_backbone` accept `zoo:resnet50` in place of a URI. A file's sha256 must
begin with the digits in its published name. The cache is `$DEEPLAB_CACHE`, or
`~/.cache/deeplab-pipeline`; files may also be put there by hand.
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
"""For each response of the host, not for the whole file."""

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
    """Return the local path of `zoo:NAME`, downloaded if needed; any other URI unchanged."""
    return str(fetch(uri.removeprefix(SCHEME))) if uri.startswith(SCHEME) else uri


def fetch(name: str) -> Path:
    """Return the path of the public file `name` in the cache, downloaded on first use.

    Raises ValueError if no file has that name, StorageError if it cannot be downloaded, and
    CheckpointError if it is not the published file, which is then deleted.
    """
    file = _file_name(name)
    path = cache_folder() / file
    try:
        if path.exists():
            _verify(path, file, origin=str(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(HOST + file, path)
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(
            "access",
            f"cannot download {HOST}{file} ({type(error).__name__}: {one_line(error)}); without a "
            f"network, download it elsewhere and put it at {path} (${CACHE_VARIABLE} sets the "
            "folder)",
        ) from None
    return path


def cache_folder() -> Path:
    """Return the folder of cached files: `$DEEPLAB_CACHE`, or one under the user's `~/.cache`."""
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder).absolute() if folder else Path.home() / ".cache" / "deeplab-pipeline"


def _file_name(name: str) -> str:
    known = {file.rpartition("-")[0]: file for file in FILES}
    if name not in known:
        raise ValueError(f"no public weight file is called {name!r}; known are {', '.join(known)}")
    return known[name]


def _download(url: str, path: Path) -> None:
    """Write the file to `path`, complete and verified, or not at all."""
    logger.warning("downloading %s to %s", url, path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "deeplab-pipeline"})
        with (
            os.fdopen(handle, "wb") as out,
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as response,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                out.write(chunk)
        _verify(Path(temporary), path.name, origin=f"the response of {url}")
        os.chmod(temporary, 0o644)  # a cache may be shared
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _verify(path: Path, file: str, *, origin: str) -> None:
    """Delete the file and raise CheckpointError if its sha256 is not that of the published one."""
    digits = file.rpartition("-")[2].partition(".")[0]
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if not found.startswith(digits):
        path.unlink()
        raise CheckpointError(
            f"{origin} is not the published {file}: its sha256 begins with "
            f"{found[: len(digits)]}; it was deleted: run again, or put a complete copy there by "
            "hand"
        )
