"""The network interface by which gloo reaches other machines.

gloo tells the other ranks the address of this machine's host name. Where nothing knows that name, or it stands for a loopback
address (Debian and its kin write `127.0.1.1 NAME` to /etc/hosts), the ranks of other machines would look for this one on their
own. So the interface is named, unless a user has: the one with the route to the place where all ranks meet, or there the one
with the route to anywhere.
"""

import fcntl
import ipaddress
import os
import socket
import struct

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
_ANYWHERE = "192.0.2.1"
"""An address that stands for no machine (RFC 5737); nothing is sent there."""


def choose_interface(size: int, local_size: int) -> None:
    """Name gloo's interface in the environment, where a job's ranks are on several machines and gloo would not find it."""
    if size == local_size or _VARIABLE in os.environ or is_reachable_by_name(socket.gethostname()):
        return
    for address in (os.environ["MASTER_ADDR"], _ANYWHERE):
        interface = interface_towards(address)
        if interface is not None:
            os.environ[_VARIABLE] = interface
            return


def is_reachable_by_name(name: str) -> bool:
    """Return whether the first address of this machine's name is its own, and one that others reach as far as it can tell.

    An address of another machine's, such as that of the router before it, is refused by torch, which falls back to loopback.
    """
    try:
        family, *_, address = socket.getaddrinfo(name, None)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind((address[0], 0))
    except OSError:
        return False
    return not _is_loopback(str(address[0]))


def interface_towards(address: str) -> str | None:
    """The interface that traffic to an address leaves by; None where there is no route, or it stays on this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        try:
            # Connecting a datagram socket chooses the route, and sends nothing.
            found.connect((address, 9))
        except OSError:
            return None
        own = found.getsockname()[0]
        names = [] if _is_loopback(own) else [name for _, name in socket.if_nameindex()]
        return next((name for name in names if _address_of(name, found) == own), None)


def _address_of(interface: str, any_socket: socket.socket) -> str | None:
    request = struct.pack("256s", interface.encode())
    try:
        return socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24])
    except OSError:
        return None  # It has no address.


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
