"""Fetches input images over https from configured hosts, never from private networks.

A sender chooses the URL, and the worker may have access to networks that senders cannot reach
(server-side request forgery). Therefore host, port and all addresses of the host are validated
before a connection. The connection uses a validated address, and each redirect is validated again.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from functools import partial
from http import HTTPStatus
from urllib.parse import SplitResult, urljoin, urlsplit

from urllib3.exceptions import HTTPError, SSLError
from urllib3.response import BaseHTTPResponse

from consumer.artifacts.calls import Calls, pinned_pool
from consumer.ports.media import InputUnavailable

WITHIN = 20.0  # seconds for one image, including redirects
MAX_REDIRECTS = 3
MAX_URL = 2_048  # characters
_HTTPS = 443
_URL = re.compile(r"https://[!-~]+\Z")  # printable ASCII without spaces

# Networks without public hosts, from the IANA registries of special-purpose addresses and the
# documentation of cloud providers.
_SPECIAL_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network (RFC 791)
            "10.0.0.0/8",  # private (RFC 1918)
            "100.64.0.0/10",  # shared (RFC 6598); Alibaba's metadata, 100.100.100.200
            "127.0.0.0/8",  # loopback (RFC 1122)
            "169.254.0.0/16",  # link-local (RFC 3927); metadata of most clouds
            "172.16.0.0/12",  # private (RFC 1918)
            "192.0.0.0/24",  # protocol assignments (RFC 6890); Oracle's metadata, 192.0.0.192
            "192.0.2.0/24",  # documentation (RFC 5737)
            "192.31.196.0/24",  # AS112 (RFC 7535)
            "192.52.193.0/24",  # multicast tunnels (RFC 7450)
            "192.88.99.0/24",  # 6to4 relays (RFC 7526)
            "192.168.0.0/16",  # private (RFC 1918)
            "192.175.48.0/24",  # AS112 (RFC 7534)
            "198.18.0.0/15",  # benchmarks (RFC 2544)
            "198.51.100.0/24",  # documentation (RFC 5737)
            "203.0.113.0/24",  # documentation (RFC 5737)
            "224.0.0.0/4",  # multicast (RFC 5771)
            "240.0.0.0/4",  # reserved, and broadcast (RFC 1112)
            "168.63.129.16/32",  # Azure's platform, which answers every virtual machine
        ),
    )
)
# All addresses that IANA has allocated for global unicast. Excluded are loopback, unique-local,
# link-local and site-local addresses, multicast, and representations of IPv4 addresses: mapped,
# compatible, translated (RFC 2765) and both prefixes of NAT64 (RFC 6052, RFC 8215).
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments (RFC 2928): Teredo, ORCHID, benchmarks and others
            "2001:db8::/32",  # documentation (RFC 3849)
            "2002::/16",  # 6to4 (RFC 3056): an IPv4 address inside
            "2620:4f:8000::/48",  # AS112 (RFC 7534)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
# The upper half of an ISATAP interface identifier (RFC 5214); the lower half is an IPv4 address.
_ISATAP = 0x0000_5EFE
_ISATAP_MASK = 0xFDFF_FFFF  # ignores the bit for the uniqueness of the IPv4 address
_REDIRECTS = frozenset(
    {
        HTTPStatus.MOVED_PERMANENTLY,
        HTTPStatus.FOUND,
        HTTPStatus.SEE_OTHER,
        HTTPStatus.TEMPORARY_REDIRECT,
        HTTPStatus.PERMANENT_REDIRECT,
    }
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public network and embeds no other address.

    Every IPv6 address that represents an IPv4 address is refused, because the translators of the
    network determine its destination.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_IPV4)
    return (
        address in _GLOBAL_IPV6
        and address.scope_id is None
        and not any(address in network for network in _SPECIAL_IPV6)
        and (int(address) >> 32) & _ISATAP_MASK != _ISATAP
    )


def resolve_host(host: str, port: int) -> list[Address]:
    """Return all addresses of a host.

    Raises:
        OSError: The name is not known.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(socket_address[0]) for *_, socket_address in found]


class WebInputs:
    """Fetches images over https.

    Args:
        hosts: Allowed hosts as `host` or `host:port`; the default port is 443.
        calls: Threads for the calls.
        resolve: Returns the addresses of a host.
        may_connect: Returns whether connections to an address are allowed.
        ca_certs: PEM file of the certificate authority; None uses the system's authorities.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        calls: Calls,
        *,
        resolve: Callable[[str, int], list[Address]] = resolve_host,
        may_connect: Callable[[Address], bool] = is_public,
        ca_certs: str | None = None,
    ) -> None:
        self._hosts = {host if ":" in host else f"{host}:{_HTTPS}" for host in hosts}
        self._calls = calls
        self._resolve = resolve
        self._may_connect = may_connect
        self._ca_certs = ca_certs

    async def fetch(self, url: str, *, max_bytes: int) -> bytes:
        """Return the content of a URL.

        Raises:
            InputUnavailable: The URL is not allowed, the host fails, or the content is too large.
        """
        try:
            async with asyncio.timeout(WITHIN):
                return await self._calls.run(partial(self._read, url, max_bytes))
        except TimeoutError:
            raise InputUnavailable(f"the host took longer than {WITHIN:g} s") from None
        except SSLError:
            raise InputUnavailable("the host does not prove who it is (TLS)") from None
        except (HTTPError, OSError):
            raise InputUnavailable("the host cannot be reached") from None

    def _read(self, url: str, max_bytes: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._get(self._validate(url))
            try:
                if response.status not in _REDIRECTS:
                    return _content(response, max_bytes)
                url = urljoin(url, response.headers.get("Location", ""))
            finally:
                response.close()
        raise InputUnavailable(f"the host redirects more than {MAX_REDIRECTS} times")

    def _validate(self, url: str) -> SplitResult:
        if url.startswith("http://"):
            raise InputUnavailable("only https is read, not http")
        if len(url) > MAX_URL or not _URL.match(url):
            raise InputUnavailable("not an https address of at most 2048 plain characters")
        try:
            parts = urlsplit(url)
            allowed = f"{parts.hostname}:{parts.port or _HTTPS}" in self._hosts
        except ValueError:  # a port that is not a number, or a single bracket
            raise InputUnavailable("not an https address") from None
        if not allowed or "@" in parts.netloc:
            raise InputUnavailable("this worker reads no inputs from that host")
        return parts

    def _get(self, url: SplitResult) -> BaseHTTPResponse:
        host, port = url.hostname or "", url.port or _HTTPS
        addresses = self._resolve(host, port)
        # All addresses: a name that also has a private address is not trusted.
        if not addresses or not all(map(self._may_connect, addresses)):
            raise InputUnavailable("that host is not in the public network")
        pool = pinned_pool(str(addresses[0]), port, host=host, ca_certs=self._ca_certs)
        return pool.urlopen(
            "GET",
            f"{url.path or '/'}{'?' if url.query else ''}{url.query}",
            headers={"Host": url.netloc, "Accept": "image/png, image/jpeg, image/webp"},
            redirect=False,
            preload_content=False,
            decode_content=False,
        )


def _content(response: BaseHTTPResponse, max_bytes: int) -> bytes:
    if response.status != HTTPStatus.OK:
        raise InputUnavailable(f"the host answered {response.status}")
    # Without decoding: a gzip body could expand without a limit.
    data = response.read(max_bytes + 1, decode_content=False)
    if len(data) > max_bytes:
        raise InputUnavailable(f"the image has more than {max_bytes} bytes")
    return data
