"""A Ray cluster of several nodes on this machine, to test what depends on a network.

    python -m cluster.local start --nodes 3        a head without CPUs, and three nodes
    eval "$(python -m cluster.local environment)"  then: ray job submit --working-dir . -- ...
    python -m cluster.local cut 2                  node 2 becomes unreachable
    python -m cluster.local restore 2
    python -m cluster.local drop 3                 killed and removed
    python -m cluster.local add
    python -m cluster.local stop

As root each node is in a network namespace of its own, with its own address, host name and
temporary folder, joined by a bridge; otherwise all are on loopback, where no link can be cut. The
cluster requires a token. `stop` ends only processes of this cluster. `--folder` keeps its state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.networks import Loopback, Namespaces, Network, has_namespaces

HEAD = 0
STORE_BYTES = 200 * 2**20  # object store of a node
_START_S = 180.0
_TRIES = 3  # on a busy machine a node may start too slowly for Ray, whose timeout is fixed


class Cluster:
    """A head (node 0) and nodes that come and go. `folder` keeps their logs and the token."""

    def __init__(self, folder: Path, *, cpus: int = 2, network: Network | None = None) -> None:
        self.folder = folder
        self.cpus = cpus
        self.network = network or _network(f"dl{secrets.token_hex(3)}")
        self.pids: dict[int, int] = {}  # node -> its `ray start`
        self._last = HEAD

    def start(self, nodes: int, variables: Mapping[str, str] | None = None) -> None:
        """Start the head and `nodes` nodes, with `variables` in their environments.

        The network must be open already: other servers may use its gateway before the nodes do.
        Raises RuntimeError if a node does not start.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        (self.folder / "variables.json").write_text(json.dumps(dict(variables or {})))
        port, dashboard = self.network.head_ports
        address = self.network.add(HEAD)
        head = ["--head", "--num-cpus=0", f"--port={port}", "--disable-usage-stats"]
        head += [f"--dashboard-host={address}", f"--dashboard-port={dashboard}"]
        head += [f"--temp-dir={self.network.temporary}"]
        self._ray(HEAD, head)
        for _ in range(nodes):
            self.add()

    def add(self) -> int:
        """Start another node and return its number."""
        self._last += 1
        self.network.add(self._last)
        join = f"--address={self.network.address(HEAD)}:{self.network.head_ports[0]}"
        self._ray(self._last, [join, f"--num-cpus={self.cpus}"])
        return self._last

    @property
    def nodes(self) -> list[int]:
        """The numbers of all nodes but the head."""
        return sorted(set(self.pids) - {HEAD})

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which `ray job` and the jobs find the cluster."""
        address = self.network.address(HEAD)
        return {
            "RAY_ADDRESS": f"http://{address}:{self.network.head_ports[1]}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
        }

    def cut(self, number: int) -> None:
        """Drop all packets of the node from now on."""
        self.network.cut(number)

    def restore(self, number: int) -> None:
        self.network.restore(number)

    def drop(self, number: int) -> None:
        """Kill everything on the node and remove it."""
        self._kill(number)
        self.network.remove(number)

    def preempt(self, number: int, *, after_s: float = 30.0) -> None:
        """Preempt the node as a cloud does: SIGTERM now, removed after `after_s`."""
        os.kill(self.pids[number], signal.SIGTERM)
        time.sleep(after_s)
        self.drop(number)

    def stop(self) -> None:
        """End all nodes and remove the network."""
        for number in sorted(self.pids, reverse=True):
            self.drop(number)
        self.network.close()

    def log(self, number: int) -> str:
        """Return the output of `ray start` on the node."""
        return (self.folder / f"node-{number}.log").read_text()

    def _ray(self, number: int, flags: list[str]) -> None:
        ray = str(Path(sysconfig.get_path("scripts")) / "ray")
        command = [ray, "start", "--block", f"--node-ip-address={self.network.address(number)}"]
        command += [f"--object-store-memory={STORE_BYTES}", *flags]
        environment = {**os.environ, **json.loads((self.folder / "variables.json").read_text())}
        environment |= self.environment
        environment.pop("RAY_ADDRESS")  # with it, `ray start` would join a cluster
        environment["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        for _ in range(_TRIES):
            self._launch(number, command, environment)
            if self._has_started(number):
                return
            self._kill(number)
        self.network.remove(number)
        raise RuntimeError(f"node {number} did not start: {self.log(number)[-1000:]}")

    def _launch(self, number: int, command: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"node-{number}.log").open("w") as log:
            process = subprocess.Popen(
                self.network.within(number, command),
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pids[number] = process.pid

    def _has_started(self, number: int) -> bool:
        """Wait until Ray runs on the node; False if it ends or takes too long."""
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in self.log(number):
            ended = os.waitid(os.P_PID, self.pids[number], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def _kill(self, number: int) -> None:
        pid = self.pids.pop(number)
        for each in {*with_descendants(pid), *self.network.pids(number)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    def save(self) -> None:
        """Save what another process needs to control the cluster."""
        known = {"name": self.network.name, "subnet": self.network.subnet, "cpus": self.cpus}
        known |= {"ports": self.network.head_ports, "pids": self.pids, "last": self._last}
        (self.folder / "cluster.json").write_text(json.dumps(known))

    @classmethod
    def load(cls, folder: Path) -> Cluster:
        """Load a saved cluster. Raises FileNotFoundError if there is none."""
        known: dict[str, Any] = json.loads((folder / "cluster.json").read_text())
        network = _network(known["name"], known["subnet"])
        network.head_ports = tuple(known["ports"])
        found = cls(folder, cpus=known["cpus"], network=network)
        found.pids = {int(number): pid for number, pid in known["pids"].items()}
        found._last = known["last"]
        return found


def _network(name: str, subnet: str | None = None) -> Network:
    kind = Loopback if subnet == Loopback.subnet or not has_namespaces() else Namespaces
    return kind(name, subnet)


def with_descendants(pid: int) -> list[int]:
    """Return the process and all its descendants, according to /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command on the cluster of the folder and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "deeplab-cluster"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("start")
    start.add_argument("--nodes", type=int, default=2)
    start.add_argument("--cpus", type=int, default=2, help="of each node")
    for verb in ("add", "environment", "stop"):
        verbs.add_parser(verb)
    for verb in ("cut", "restore", "drop", "preempt"):
        verbs.add_parser(verb).add_argument("node", type=int)
    given = parser.parse_args(argv)
    try:
        _do(given)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        print(f"cluster {given.verb} failed: {error}", file=sys.stderr)
        return 1
    return 0


def _do(given: argparse.Namespace) -> None:
    if given.verb == "start":
        if (given.folder / "cluster.json").exists():
            raise ValueError(f"--folder {given.folder}: has a cluster; stop it, or give another")
        cluster = Cluster(given.folder, cpus=given.cpus)
        try:
            cluster.network.open()
            cluster.start(given.nodes)
        except BaseException:
            cluster.stop()
            raise
        cluster.save()
        print(f"{given.nodes} nodes started; they reach this machine at {cluster.network.gateway}")
        return
    if not (given.folder / "cluster.json").exists():
        raise ValueError(f"--folder {given.folder}: has no cluster; start one")
    cluster = Cluster.load(given.folder)
    if given.verb == "environment":
        for name, value in cluster.environment.items():
            print(f"export {name}={shlex.quote(value)}")
    elif given.verb == "stop":
        cluster.stop()
        (given.folder / "cluster.json").unlink()
    elif given.verb == "add":
        print(cluster.add())
        cluster.save()
    else:
        if given.node not in cluster.nodes:
            raise ValueError(f"node {given.node}: must be one of {cluster.nodes}")
        getattr(cluster, given.verb)(given.node)
        cluster.save()


if __name__ == "__main__":
    sys.exit(main())
