"""Parsing of NATS server URLs, from settings and for clients."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

FORM = "must be nats://[user:password@]host[:port] or nats://token@host[:port], comma-separated"
_ENCODE = "percent-encode the user, the password and the token (%2F for /, %2C for a comma)"
_SCHEMES = ("nats", "tls", "ws", "wss")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Servers:
    """NATS servers of one installation, and the user information of their URLs.

    nats-py does not decode the user information of a URL, and does not send it to a server that
    another server has announced. So this class separates the URLs and the user.

    Attributes:
        urls: URLs without user information.
        user: Decoded; None if the URLs have no user.
        password: Decoded.
        token: Decoded user information without a colon.
    """

    urls: tuple[str, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def credentials(self) -> dict[str, str]:
        """The options of `nats.connect` for the user; empty if the URLs have none."""
        named = {"user": self.user, "password": self.password, "token": self.token}
        return {name: value for name, value in named.items() if value is not None}


def parse_servers(text: str) -> Servers:
    """Parse a comma-separated list of URLs with percent-encoded user information.

    Args:
        text: For example `nats://app:p%40ss@a:4222,nats://b:4222`. A URL without user information
            gets that of the others.

    Raises:
        ValueError: Not a valid list, or its URLs have different users. The text has no secret.
    """
    urls: list[str] = []
    named: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        url, user_information = _split(part)
        is_token = user_information and ":" not in user_information
        if urls and not named and is_token and not _SCHEME.match(part):
            # Probably the second half of a password that contains a comma.
            raise ValueError(_ENCODE)
        urls.append(url)
        if user_information and user_information not in named:
            named.append(user_information)
    if not urls:
        raise ValueError(FORM)
    if len({_websocket(url) for url in urls}) > 1:
        raise ValueError("all servers must be ws:// or wss://, or none of them")
    if len(named) > 1:
        raise ValueError("all servers must have the same user and password")
    if not named:
        return Servers(tuple(urls))
    user, colon, password = named[0].partition(":")
    if not colon:
        return Servers(tuple(urls), token=_decoded(user))
    return Servers(tuple(urls), user=_decoded(user), password=_decoded(password))


def _split(url: str) -> tuple[str, str]:
    """Return a URL without its user information, and the user information."""
    try:
        parts = urlsplit(url if _SCHEME.match(url) else f"nats://{url}")
        usable = parts.scheme in _SCHEMES and parts.hostname and parts.port != 0
    except (
        ValueError
    ):  # invalid port or IPv6 address: often an unencoded `/`, `#` or `[` in a password
        usable = None
    if not usable:
        raise ValueError(f"{FORM}; {_ENCODE}")
    if "@" in parts.path + parts.query + parts.fragment:  # the part before it is not the host
        raise ValueError(_ENCODE)
    user_information, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=place).geturl(), user_information


def _websocket(url: str) -> bool:
    return urlsplit(url).scheme in {"ws", "wss"}


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the user and the password must be UTF-8") from None
