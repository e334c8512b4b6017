"""Where messages may go: to public addresses over https, and to what the operator allows; nowhere else.

A name is resolved once, every address of it is checked, and the connection then goes to the address that was
checked, so that a name cannot mean one thing when it is checked and another when it is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

from merging.errors import InputError
from service.errors import ServiceError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL = 2048
_PORTS = (443, 8443)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_RESOLVE_SECONDS = 5.0
_HOST = re.compile(r"^(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?$")
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_SPECIAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocols; how much of it Python takes for global depends on its version
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # Teredo, ORCHID and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",
    )
)


class Refused(ServiceError):
    """A place where no message is sent."""


@dataclass(frozen=True)
class Place:
    """A URL, taken apart. ``host`` is in lower case and has no brackets."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """The value of the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def ordinary(self) -> bool:
        """Whether scheme and port are what anybody may use."""
        return self.scheme == "https" and self.port in _PORTS


@dataclass(frozen=True)
class Allowed:
    """What the operator allows beyond public addresses: names, and networks."""

    hosts: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """Comma-separated names, addresses and networks. Raises ``settings_invalid``."""
        hosts: list[str] = []
        networks: list[Network] = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(item.strip("[]"), strict=False))
            except ValueError:
                if "/" in item or not _HOST.match(item) or _literal(item) is not None:
                    raise InputError(
                        "settings_invalid",
                        f"MERGANSER_WEBHOOK_ALLOW: {item[:80]!r} is neither a host nor a network",
                        remedy="Correct the setting MERGANSER_WEBHOOK_ALLOW",
                        where={"field": "MERGANSER_WEBHOOK_ALLOW"},
                    ) from None
                hosts.append(item.lower().rstrip("."))
        return cls(tuple(hosts), tuple(networks))

    def host(self, name: str) -> bool:
        """Whether a name is allowed, wherever it leads."""
        return name in self.hosts

    def address(self, address: Address) -> bool:
        """Whether an address is in an allowed network."""
        return any(address.version == network.version and address in network for network in self.networks)


def check_url(url: str, allowed: Allowed, *, field: str = "url") -> Place:
    """A URL that may be used as far as can be told without a name server.

    Raises ``webhook_url_invalid``, ``webhook_url_refused``.
    """
    place = _parse(url, field)
    literal = _literal(place.host)
    if allowed.host(place.host):
        return place
    if literal is not None:
        _decide(place, [literal], allowed, field)
    elif not place.ordinary and not allowed.networks:
        raise _not_ordinary(field)
    return place


async def resolve(url: str, allowed: Allowed) -> tuple[Place, Address]:
    """A URL and the one checked address to connect to.

    Raises what :func:`check_url` does, and ``webhook_host_unknown``.
    """
    place = check_url(url, allowed)
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        found = []
    addresses = [_plain(ipaddress.ip_address(entry[4][0])) for entry in found]
    if not addresses:
        raise Refused("webhook_host_unknown", "the host of the webhook cannot be resolved")
    if not allowed.host(place.host):
        _decide(place, addresses, allowed, "url")
    return place, addresses[0]


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet, by itself and by what it may be translated to."""
    address = _plain(address)
    if isinstance(address, IPv6Address) and address not in _GLOBAL_V6:
        return False  # among them NAT64 (64:ff9b::/96), IPv4-compatible, unique local, link-local, multicast
    if any(address.version == network.version and address in network for network in _SPECIAL):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _decide(place: Place, addresses: list[Address], allowed: Allowed, field: str) -> None:
    """Every address must be good: one bad one spoils the name."""
    if all(allowed.address(address) for address in addresses):
        return
    if not all(allowed.address(address) or is_public(address) for address in addresses):
        raise Refused(
            "webhook_url_refused",
            "the host of the webhook has an address that is not public",
            remedy="Whoever runs the service can allow it with MERGANSER_WEBHOOK_ALLOW",
            where={"field": field},
        )
    if not place.ordinary:
        raise _not_ordinary(field)


def _plain(address: Address) -> Address:
    """An IPv4 address that is written as an IPv6 one, as what it is."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _literal(host: str) -> Address | None:
    """The address that a host is, also in the odd forms that resolvers take: 127.1, 0x7f000001."""
    try:
        return _plain(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def _parse(url: str, field: str) -> Place:
    problem: str | None = None
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise _invalid("it cannot be read", field) from None
    if len(url) > MAX_URL or not url.isascii() or any(char <= " " or char in '\\"<>\x7f' for char in url):
        problem = "it is too long or has characters that a URL cannot have"
    elif parts.scheme not in _DEFAULT_PORTS or not host:
        problem = "it does not begin with https:// and a host"
    elif "@" in parts.netloc or parts.fragment:
        problem = "it has a user, a password or a fragment"
    elif ":" not in host and not _HOST.match(host):
        problem = "its host is not a name"
    elif port == 0:
        problem = "its port is 0"
    if problem:
        raise _invalid(problem, field)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = host if ":" in host else host.rstrip(".")
    return Place(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], target)


def _invalid(problem: str, field: str) -> Refused:
    return Refused(
        "webhook_url_invalid",
        f"the URL of the webhook is not usable: {problem}",
        remedy="Use https://host/path",
        where={"field": field},
    )


def _not_ordinary(field: str) -> Refused:
    return Refused(
        "webhook_url_refused",
        "webhooks go to https on port 443 or 8443",
        remedy="Whoever runs the service can allow more with MERGANSER_WEBHOOK_ALLOW",
        where={"field": field},
    )
