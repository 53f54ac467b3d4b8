"""Refuse connections to internal addresses: this machine, its network, a cloud's metadata service."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import Any

from sa3dist.errors import DataError

# Environment variable, inherited by child processes. Set where untrusted users choose addresses.
PUBLIC_ONLY_VARIABLE = "SA3DIST_PUBLIC_ADDRESSES_ONLY"
# IPv4 inside IPv6: translated by the network (RFC 6052), and the deprecated "compatible" form.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(address: str) -> bool:
    """Whether ``address`` is a public IP address, in any notation. False for an invalid one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner is None and (ip in _NAT64 or ip in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local
    return ip.is_global and not special


def inward_address(host: str, port: int) -> str | None:
    """An internal address of ``host``, or None. Raises OSError if the name cannot be resolved."""
    # Without the trailing dot of a fully qualified name.
    entries = socket.getaddrinfo(host.rstrip("."), port, type=socket.SOCK_STREAM)
    return next((entry[4][0] for entry in entries if not is_public(entry[4][0])), None)


def public_socket(entry: Sequence[Any]) -> socket.socket:
    """aiohttp's ``socket_factory``, called with an entry of ``getaddrinfo`` for every connection, redirects included.

    Raises DataError if the address is internal.
    """
    family, kind, protocol, _, address = entry
    if not is_public(address[0]):
        raise DataError(f"{address[0]}: points to this machine or its network; give an address of the open internet")
    return socket.socket(family, kind, protocol)


def is_public_only() -> bool:
    """Whether this process may fetch only from public addresses."""
    return bool(os.environ.get(PUBLIC_ONLY_VARIABLE))
