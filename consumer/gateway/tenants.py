"""Tenants, callers and their bounds, and the request ids of tenants."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime

TAG_LENGTH = 8  # characters of [a-z0-9]; every request id of a tenant starts with its tag
IDEMPOTENT = "k"  # after the tag: the id is derived from an idempotency key
TIMED = "t"  # after the tag: the id continues with the time of submission
OPEN_TAG = "open0000"
_RANDOM = 16  # hexadecimal characters
_TIME = 12  # hexadecimal characters of milliseconds since 1970
_YEAR_9999 = 253_000_000_000_000  # milliseconds since 1970; datetime ends there
_OWN_ID = re.compile(r"[a-z0-9]{8}-[kt][A-Za-z0-9_-]{1,54}\Z")


@dataclass(frozen=True)
class Bounds:
    """The bounds of one key; None: no bound.

    Attributes:
        waiting: Most queued and running requests of the tenant.
        per_minute: Most requests per minute.
        pixels: Largest width times height of one image.
        steps: Most denoising steps of one request.
        images: Most images of one request.
    """

    waiting: int | None = None
    per_minute: int | None = None
    pixels: int | None = None
    steps: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Tenant:
    """The owner of a set of jobs; a tenant sees only its own jobs.

    Attributes:
        name: Name for people.
        tag: Prefix of all request ids of the tenant.
        secret: HMAC key that derives request ids from idempotency keys, so they cannot be guessed.
    """

    name: str
    tag: str
    secret: bytes = field(repr=False)

    def new_id(self, milliseconds: int) -> str:
        """Return a new request id; ids sort by the time of submission."""
        return f"{self.tag}-{TIMED}{milliseconds:0{_TIME}x}{secrets.token_hex(_RANDOM // 2)}"

    def id_of(self, idempotency_key: str) -> str:
        """Return the request id of an idempotency key; it is always the same."""
        digest = hmac.new(self.secret, idempotency_key.encode(), hashlib.sha256).hexdigest()
        return f"{self.tag}-{IDEMPOTENT}{digest[:40]}"

    def owns(self, request_id: str) -> bool:
        """Return whether a request id belongs to this tenant."""
        return _OWN_ID.match(request_id) is not None and request_id.startswith(f"{self.tag}-")


@dataclass(frozen=True)
class Caller:
    """The sender of an HTTP request.

    Attributes:
        key_id: Id of the API key, for logs; empty without keys.
    """

    tenant: Tenant
    key_id: str = ""
    bounds: Bounds = Bounds()


def tag_of(request_id: str) -> str | None:
    """Return the tenant's tag of a request id; None if the id has not the form of a gateway's."""
    return request_id[:TAG_LENGTH] if _OWN_ID.match(request_id) else None


def submitted_at(request_id: str) -> datetime | None:
    """Return the time of submission that an id contains, or None."""
    kind, digits = request_id[TAG_LENGTH + 1 :][:1], request_id[TAG_LENGTH + 2 :][:_TIME]
    if kind != TIMED or not re.fullmatch(f"[0-9a-f]{{{_TIME}}}", digits):
        return None
    milliseconds = int(digits, 16)
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds < _YEAR_9999 else None
