"""Networks of a local cluster: a network namespace per node and a bridge, or loopback.

Only interfaces and namespaces created here are changed or removed: their names start with that of
the cluster.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
from pathlib import Path

_HOSTS = Path("/etc/netns")  # `ip netns exec` mounts files of a namespace's folder here in /etc


def has_namespaces() -> bool:
    """Whether this process may create network namespaces."""
    programs = all(shutil.which(name) for name in ("ip", "unshare"))
    return os.geteuid() == 0 and programs and _can("netns", f"probe-{os.getpid()}")


class Namespaces:
    """A private network: node N has address SUBNET.(10 + N), this machine SUBNET.1.

    Source: ip-netns(8), ip-link(8). Needs root.
    """

    head_ports = ("6379", "8265")  # the head has an address of its own

    def __init__(self, name: str, subnet: str | None = None) -> None:
        self.name = name
        self.subnet = subnet or _free_subnet()
        self.temporary = temporary_folder(name)

    @property
    def gateway(self) -> str:
        """Address of this machine, which all nodes can reach."""
        return f"{self.subnet}.1"

    def open(self) -> None:
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self.name)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, number: int) -> str:
        """Create the namespace of node `number` and return its address."""
        node, cable, address = self._node(number), self._cable(number), self.address(number)
        _ip("netns", "add", node)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node)
        _ip("link", "set", cable, "master", self.name, "up")
        _ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            _ip("-n", node, "link", "set", link, "up")
        # the host name resolves to the node's address, as on a real machine: gloo looks it up
        (_HOSTS / node).mkdir(parents=True, exist_ok=True)
        (_HOSTS / node / "hosts").write_text(f"127.0.0.1 localhost\n{address} {node}\n")
        (self.temporary / node).mkdir(parents=True)
        return address

    def remove(self, number: int) -> None:
        node = self._node(number)
        for arguments in (("link", "del", self._cable(number)), ("netns", "del", node)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*arguments)
        for folder in (_HOSTS / node, self.temporary / node):
            shutil.rmtree(folder, ignore_errors=True)

    def address(self, number: int) -> str:
        return f"{self.subnet}.{10 + number}"

    def within(self, number: int, command: list[str]) -> list[str]:
        """Return the command that runs `command` on the node.

        It has its own host name and its own temporary folder: Ray unpacks working directories
        there, and a node that ends deletes them.
        """
        node, folder = self._node(number), str(self.temporary)
        script = 'hostname "$0" && mount --bind "$1/$0" "$1" && shift && exec "$@"'
        isolated = ["ip", "netns", "exec", node, "unshare", "--uts", "--mount"]
        return [*isolated, "sh", "-c", script, node, folder, *command]

    def pids(self, number: int) -> list[int]:
        """Return the ids of all processes of the node."""
        result = subprocess.run(
            ["ip", "netns", "pids", self._node(number)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in result.stdout.split()]

    def cut(self, number: int) -> None:
        """Take down the link of the node: packets are lost without an error."""
        _ip("link", "set", self._cable(number), "down")

    def restore(self, number: int) -> None:
        _ip("link", "set", self._cable(number), "up")

    def _node(self, number: int) -> str:
        return f"{self.name}-{number}"

    def _cable(self, number: int) -> str:
        return f"{self.name}v{number}"


class Loopback:
    """No network: every node has address 127.0.0.1, and there are no links to cut."""

    gateway = "127.0.0.1"
    subnet = "127.0.0"

    def __init__(self, name: str, subnet: str | None = None) -> None:
        self.name = name
        self.temporary = temporary_folder(name)
        self.head_ports = (str(_free_port()), str(_free_port()))

    def open(self) -> None:
        pass

    def close(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, number: int) -> str:
        return self.address(number)

    def remove(self, number: int) -> None:
        pass

    def address(self, number: int) -> str:
        return self.gateway

    def within(self, number: int, command: list[str]) -> list[str]:
        return command

    def pids(self, number: int) -> list[int]:
        """Return no processes beyond the node's process and its descendants."""
        return []

    def cut(self, number: int) -> None:
        raise RuntimeError("nodes on loopback have no link to cut: run as root, with iproute2")

    restore = cut


Network = Namespaces | Loopback


def temporary_folder(name: str) -> Path:
    """Return the temporary folder of Ray, outside $TMPDIR because socket paths must be short."""
    return Path("/tmp", name)


def _free_subnet() -> str:
    """Return the first three octets of a private network that this machine does not route to."""
    taken = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    while True:
        subnet = f"10.{random.randint(128, 254)}.{random.randint(0, 254)}"
        if f"{subnet}." not in taken:
            return subnet


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _can(*probe: str) -> bool:
    try:
        _ip(probe[0], "add", *probe[1:])
        _ip(probe[0], "del", *probe[1:])
    except subprocess.CalledProcessError:
        return False
    return True


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
