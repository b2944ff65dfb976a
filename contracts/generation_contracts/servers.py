"""Addresses of NATS servers, as settings and clients name them."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

FORM = "must be nats://[user:password@]host[:port], comma-separated for more"
_SCHEMES = ("nats", "tls", "ws", "wss")
_SCHEME = re.compile(r"([A-Za-z]+)://")


@dataclass(frozen=True)
class Servers:
    """Servers of one installation, and what their URLs say about the user.

    nats-py sends the user information of a URL as it is written there, percent-encoded, and sends
    none to a server that it has learned of from another server. So the two are kept apart.

    Attributes:
        urls: Without user information.
        user: Decoded; None where the URLs name none.
        password: Decoded.
        token: Decoded; the user information of a URL that has no password.
    """

    urls: tuple[str, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def credentials(self) -> dict[str, str]:
        """The options of `nats.connect` for the user; empty where the URLs name none."""
        named = {"user": self.user, "password": self.password, "token": self.token}
        return {name: value for name, value in named.items() if value is not None}


def parse_servers(text: str) -> Servers:
    """Read a comma-separated list of URLs, with percent-encoded user information.

    Args:
        text: For example `nats://app:p%40ss@a:4222,nats://b:4222`. A URL without user information
            takes that of the others.

    Raises:
        ValueError: Not such a list, or its URLs name different users; the text has no secret.
    """
    urls: list[str] = []
    named: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        url, user_information = _split(part)
        urls.append(url)
        if user_information is not None and user_information not in named:
            named.append(user_information)
    if not urls:
        raise ValueError(FORM)
    if len(named) > 1:
        raise ValueError("all servers must have the same user and password")
    if not named:
        return Servers(tuple(urls))
    user, colon, password = named[0].partition(":")
    if not colon:
        return Servers(tuple(urls), token=_decoded(user))
    return Servers(tuple(urls), user=_decoded(user), password=_decoded(password))


def _split(url: str) -> tuple[str, str | None]:
    scheme = _SCHEME.match(url)
    parts = urlsplit(url if scheme else f"nats://{url}")
    user_information, at, place = parts.netloc.rpartition("@")
    try:
        usable = parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number: often a password with a plain `/` or `#`
        usable = None
    if not usable or parts.scheme not in _SCHEMES:
        raise ValueError(f"{FORM}; the user and the password are percent-encoded")
    return parts._replace(netloc=place).geturl(), user_information if at else None


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the user and the password must be UTF-8") from None
