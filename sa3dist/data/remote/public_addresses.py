"""Addresses that point inward (this machine, its network, a cloud's metadata), and connections that refuse them."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import Any

from sa3dist.errors import DataError

# Set for this process and its children: whoever chose an address must not reach what only this machine can.
PUBLIC_ONLY_VARIABLE = "SA3DIST_PUBLIC_ADDRESSES_ONLY"
# IPv4 inside of IPv6: translated by the network (RFC 6052), and the deprecated "compatible" form.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(address: str) -> bool:
    """Whether an IP address, in whatever form, is public. False for text that is not an address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if inner is None and (found in _NAT64 or found in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    kinds = (found.is_multicast, found.is_reserved, found.is_unspecified, found.is_loopback, found.is_link_local)
    return found.is_global and not any(kinds)


def inward_address(host: str, port: int) -> str | None:
    """An address of ``host`` that points inward, or None. Raises OSError if the name is unknown."""
    # A trailing dot marks a fully qualified name.
    found = socket.getaddrinfo(host.rstrip("."), port, type=socket.SOCK_STREAM)
    return next((entry[4][0] for entry in found if not is_public(entry[4][0])), None)


def public_socket(entry: Sequence[Any]) -> socket.socket:
    """A socket for one entry of ``getaddrinfo``. aiohttp calls it before connecting, after names and redirects.

    Raises DataError if the address points inward.
    """
    family, kind, protocol, _, address = entry
    if not is_public(address[0]):
        raise DataError(f"{address[0]}: points to this machine or its network; give an address of the open internet")
    return socket.socket(family, kind, protocol)


def is_public_only() -> bool:
    """Whether this process may fetch from public addresses only."""
    return bool(os.environ.get(PUBLIC_ONLY_VARIABLE))
