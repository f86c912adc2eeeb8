"""The network between the nodes of a local cluster, without Ray, and its command line."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import local
from cluster.networks import Loopback, Namespaces, has_namespaces

pytestmark = pytest.mark.process

HELLO = "import socket; print(socket.create_connection(('{}', {}), timeout=2).recv(9).decode())"


@pytest.fixture
def network() -> Iterator[Namespaces]:
    if not has_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    made = Namespaces(f"dl{secrets.token_hex(3)}")
    made.open()
    yield made
    for number in (1, 2):
        made.remove(number)
    made.close()


def _receives(network: Namespaces, number: int, address: tuple[str, int]) -> bool:
    command = network.within(number, [sys.executable, "-c", HELLO.format(*address)])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() == "hello"


def test_nodes_reach_each_other_and_this_machine_until_the_link_is_cut(network: Namespaces) -> None:
    addresses = [network.add(number) for number in (1, 2)]
    assert len({*addresses, network.gateway}) == 3
    serve = (
        f"import socket; s = socket.create_server(('{addresses[0]}', 7000))\n"
        "print('up', flush=True)\n"
        "while True: c, _ = s.accept(); c.sendall(b'hello'); c.close()"
    )
    command = network.within(1, [sys.executable, "-c", serve])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        assert server.pid in network.pids(1)
        assert _receives(network, 2, (addresses[0], 7000))
        network.cut(1)
        assert not _receives(network, 2, (addresses[0], 7000))
        network.restore(1)
        assert _receives(network, 2, (addresses[0], 7000))
        socket.create_connection((addresses[0], 7000), timeout=2).close()  # from this machine
        server.kill()


def test_the_host_name_of_a_node_resolves_to_its_address(network: Namespaces) -> None:
    address = network.add(1)
    code = "import socket; print(socket.gethostname(), socket.gethostbyname(socket.gethostname()))"
    command = network.within(1, [sys.executable, "-c", code])
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split() == [f"{network.name}-1", address]
    assert socket.gethostname() != f"{network.name}-1"  # this machine keeps its own


def test_the_temporary_folder_of_a_node_is_private(network: Namespaces) -> None:
    for number in (1, 2):
        network.add(number)
    file = f"{network.temporary}/mine"
    subprocess.run(network.within(1, ["touch", file]), check=True)
    for number, sees in ((1, 0), (2, 1)):
        done = subprocess.run(network.within(number, ["test", "-e", file]), check=False)
        assert done.returncode == sees


def test_a_closed_network_leaves_nothing(network: Namespaces) -> None:
    network.add(1)
    network.remove(1)
    network.close()
    for command in (["ip", "netns"], ["ip", "-o", "link"], ["ip", "route"]):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert network.name not in output
        assert f"{network.subnet}." not in output
    assert not Path(f"/etc/netns/{network.name}-1").exists()
    assert not network.temporary.exists()


def test_loopback_has_no_link_to_cut() -> None:
    with pytest.raises(RuntimeError, match="run as root, with iproute2"):
        Loopback("dl").cut(1)


def test_the_command_line_names_a_missing_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local.main(["--folder", str(tmp_path), "cut", "1"]) == 1
    assert (
        f"cluster cut failed: --folder {tmp_path}: has no cluster; start one"
        in capsys.readouterr().err
    )


def test_a_saved_cluster_is_loaded_unchanged(tmp_path: Path) -> None:
    made = local.Cluster(tmp_path, cpus=3, network=Loopback("dlabc"))
    made.pids = {0: 11, 1: 12, 4: 13}
    made.save()
    found = local.Cluster.load(tmp_path)
    assert (found.nodes, found.cpus, found.pids) == ([1, 4], 3, made.pids)
    assert found.environment == made.environment
