"""Which addresses this host has, and at which of them others would look for it."""

import fnmatch
import socket
from collections.abc import Mapping
from ipaddress import ip_address

import psutil

from megamoe.errors import DistributedError

LOOPBACK = "127.0.0.1"
# Of a network kept for documentation: nothing is sent there, the kernel only says by which way it would be.
_SOMEWHERE_ELSE = ("192.0.2.1", 9)


def own_address() -> str:
    """The IPv4 address by which other hosts reach this one; the loopback address without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE_ELSE)
            return probe.getsockname()[0]
        except OSError:
            return next((address for _, address in _addresses()), LOOPBACK)


def advertised_address() -> str:
    """The address at which gloo lets other ranks look for this one when no interface is named.

    It is the first one that this host's own name resolves to and that can be bound; without such a one
    gloo takes the loopback address.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return LOOPBACK
    return next((str(place[0]) for family, _, _, _, place in found if _can_bind(family, place)), LOOPBACK)


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or "localhost", means each machine itself."""
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def outward_interface() -> str:
    """The name of the interface that has `own_address`; empty where there is none."""
    mine = own_address()
    return next((name for name, address in _addresses() if address == mine), "")


def require_interfaces(environ: Mapping[str, str], backend: str) -> None:
    """Check the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names.

    Raises:
        DistributedError: this host has none of that name.
    """
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    value, present = environ.get(variable, ""), list(psutil.net_if_addrs())
    if not value or value.startswith("^"):
        return
    # gloo needs every name of its list; NCCL takes any interface that begins like one of them.
    names = value.removeprefix("=").split(",")
    exact = backend == "gloo" or value.startswith("=")
    missing = [name for name in names if not fnmatch.filter(present, name if exact else f"{name}*")]
    if missing and (backend == "gloo" or len(missing) == len(names)):
        raise DistributedError(
            f"{variable} = {value!r}: {socket.gethostname()} has no interface {missing[0]!r}; name one of"
            f" {', '.join(present)}, or unset it"
        )


def _addresses() -> list[tuple[str, str]]:
    """Interfaces that are not loopback, with their IPv4 addresses."""
    return [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not is_loopback(entry.address)
    ]


def _can_bind(family: int, place: tuple) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(place)
        except OSError:
            return False
    return True
