"""The network interface that gloo is told."""

import os
import socket

import pytest

from pipeline.runtime.network import choose_interface, interface_towards, is_reachable_by_name

UNKNOWN = "no-such-machine.invalid"


def test_a_loopback_address_and_an_unknown_name_are_no_way_to_another_machine() -> None:
    assert [is_reachable_by_name(name) for name in ("localhost", "127.0.1.1", UNKNOWN)] == [False] * 3
    # Nor is an address that is another machine's.
    assert not is_reachable_by_name("192.0.2.7")
    assert is_reachable_by_name("0.0.0.0")
    assert interface_towards("127.0.0.1") is None
    assert interface_towards(UNKNOWN) is None


def test_the_interface_towards_another_machine_is_one_with_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = interface_towards("192.0.2.1")
    if name is None:
        pytest.skip("this machine has no route to others")
    assert name in dict(map(reversed, socket.if_nameindex()))
    # Where gloo would tell the others a loopback address.
    monkeypatch.setattr("socket.gethostname", lambda: UNKNOWN)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_interface(size=4, local_size=2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose_interface(size=2, local_size=2)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    choose_interface(size=4, local_size=2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
