"""A Ray cluster whose autoscaler starts and stops nodes, each a raylet on this machine.

It uses Ray's fake node provider. `ray.cluster_utils.AutoscalingCluster` would stop every Ray on
this machine with `ray stop`; here only processes with this cluster's mark are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TRIES = 3
_FIXED_PORTS = ("ray-client-server", "dashboard-agent-listen", "dashboard")
_HEAD_ID = "f" * 51 + "00000"  # the head's name in the fake provider


class GrowingCluster:
    """A head without CPUs, and up to `max_workers` nodes of `cpus` CPUs on demand."""

    def __init__(self, folder: Path, *, max_workers: int, cpus: int, idle_s: float) -> None:
        self._mark = f"mark-{secrets.token_hex(8)}"
        self._port = _free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._config = folder / "cluster.json"
        self._config.write_text(json.dumps(_config(self.address, max_workers, cpus, idle_s)))
        self.log = folder / "ray-start.log"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # 15 by default: workers would starve beside other tests
            "RAY_raylet_start_wait_time_s": "120",  # on a busy machine
        }

    def start(self, temporary: str) -> None:
        """Start the head. Ray's sockets are created in `temporary`, so its path must be short."""
        command = [
            *(f"{Path(sys.executable).parent}/ray", "start", "--head", f"--port={self._port}"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=0", "--include-dashboard=false"),
            *(f"--autoscaling-config={self._config}", f"--temp-dir={temporary}"),
            # ports that every other head on this machine uses too
            *(f"--{name}-port={_free_port()}" for name in _FIXED_PORTS),
            "--disable-usage-stats",
        ]
        environment = {
            **self.environment,
            "CLUSTER_MARK": self._mark,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        }
        environment.pop("RAY_ADDRESS")
        for _ in range(_TRIES):  # a raylet gives its agents 15 s, too little on a busy machine
            with self.log.open("w") as log:
                if not subprocess.run(command, env=environment, stdout=log, stderr=log).returncode:
                    return
            self.stop()
        raise RuntimeError(self.log.read_text())

    def nodes(self) -> int:
        """Return the number of running raylets, including the head's."""
        return sum(b"/raylet/raylet" in line for line in self._processes().values())

    def actors(self) -> int:
        """Return the number of actors that segment images, on any node."""
        return sum(line.startswith(b"ray::MapWorker") for line in self._processes().values())

    def stop(self) -> None:
        """Kill the cluster's processes, including those that it starts meanwhile."""
        while found := self._processes():
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _processes(self) -> dict[int, bytes]:
        """Return the command lines of the processes with the mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes()
        return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _config(address: str, max_workers: int, cpus: int, idle_s: float) -> dict[str, Any]:
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    node = {"node_config": {}, "resources": {"CPU": cpus}}
    return {
        "cluster_name": "growing",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            # as an external provider: under its own name Ray needs a file that its wheel lacks
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,  # a node is a process: nothing to install
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
        },
        "available_node_types": {
            "ray.head.default": {"node_config": {}, "resources": {"CPU": 0}, "max_workers": 0},
            "worker": {**node, "min_workers": 0, "max_workers": max_workers},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in (*lists, "worker_start_ray")},
    }


@contextlib.contextmanager
def growing_cluster(
    folder: Path, *, max_workers: int, cpus: int = 1, idle_s: float = 40.0
) -> Iterator[GrowingCluster]:
    """Run a cluster that consists of a head at first, while the block runs."""
    cluster = GrowingCluster(folder, max_workers=max_workers, cpus=cpus, idle_s=idle_s)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        try:
            cluster.start(temporary)
            yield cluster
        finally:
            cluster.stop()
