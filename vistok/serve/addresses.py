"""Which addresses the server may fetch a picture from: those of public hosts, and no others.

The lists follow the IANA registries of special-purpose addresses. They are written out because the answers of
``ipaddress`` (``is_global``, ``is_private``) have changed between versions of Python.
"""

from __future__ import annotations

import ipaddress

_FORBIDDEN_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host; Linux connects 0.0.0.0 to itself
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers; one cloud's metadata service is 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's host agent, at a public address
        "169.254.0.0/16",  # link-local, with most clouds' metadata service
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved and broadcast
    )
)

# Everything outside of global unicast is forbidden: loopback, IPv4-mapped and IPv4-compatible, link-local, unique
# local (where clouds have their IPv6 metadata service), site-local, multicast, local NAT64 and segment routing.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_FORBIDDEN_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo (an IPv4 address inside), benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "2620:4f:8000::/48",
        "3ffe::/16",  # the old test network
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})


def allowed(address: str) -> bool:
    """True for a public unicast address, in the usual notation (``93.184.216.34``, ``2606:4700::1111``).

    An IPv6 address of the well-known NAT64 prefix is judged by the IPv4 address inside: networks without IPv4 reach
    all IPv4 hosts by it. The other forms that carry an IPv4 address are refused, whatever is inside. So is what is
    no address, and an address with a zone (``fe80::1%eth0``).
    """
    if "%" in address:
        return False
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed in _NAT64:
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _FORBIDDEN_V4)
    if (int(parsed) >> 32) & 0xFFFFFFFF in _ISATAP:
        return False
    return parsed in _GLOBAL_V6 and not any(parsed in network for network in _FORBIDDEN_V6)
