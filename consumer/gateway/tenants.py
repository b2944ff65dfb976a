"""Tenants and their API keys: who a caller is, and how much it may ask for."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime

TAG_LENGTH = 8  # characters of [a-z0-9]; every request id of a tenant begins with its tag
IDEMPOTENT = "k"  # after the tag: the id is derived from an idempotency key
TIMED = "t"  # after the tag: the id begins with the time of its submission
OPEN_TAG = "open0000"
_RANDOM = 16  # hexadecimal characters
_TIME = 12  # hexadecimal characters of milliseconds since 1970
_YEAR_9999 = 253_000_000_000_000  # milliseconds since 1970; datetime ends there
_OWN_ID = re.compile(r"[a-z0-9]{8}-[kt][A-Za-z0-9_-]{1,54}\Z")


@dataclass(frozen=True)
class Bounds:
    """How much one key may ask for; None: without bound.

    Attributes:
        waiting: Requests that wait or run at the same time.
        per_minute: Requests in a minute.
        pixels: Width times height of one image.
        steps: Denoising steps of one request.
        images: Images of one request.
    """

    waiting: int | None = None
    per_minute: int | None = None
    pixels: int | None = None
    steps: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Tenant:
    """Whose requests belong together: each sees its own only.

    Attributes:
        name: For people.
        tag: The first characters of all of its request ids.
        secret: Key of the HMAC that turns idempotency keys into request ids that cannot be guessed.
    """

    name: str
    tag: str
    secret: bytes = field(repr=False)

    def new_id(self, milliseconds: int) -> str:
        """Make a request id; ids sort by the time of their submission."""
        return f"{self.tag}-{TIMED}{milliseconds:0{_TIME}x}{secrets.token_hex(_RANDOM // 2)}"

    def id_of(self, idempotency_key: str) -> str:
        """Make the request id of an idempotency key: the same one each time."""
        digest = hmac.new(self.secret, idempotency_key.encode(), hashlib.sha256).hexdigest()
        return f"{self.tag}-{IDEMPOTENT}{digest[:40]}"

    def owns(self, request_id: str) -> bool:
        """Whether a request id is one of this tenant's."""
        return _OWN_ID.match(request_id) is not None and request_id.startswith(f"{self.tag}-")


@dataclass(frozen=True)
class Caller:
    """Who sends an HTTP request.

    Attributes:
        key_id: Names the API key in logs; empty without keys.
    """

    tenant: Tenant
    key_id: str = ""
    bounds: Bounds = Bounds()


def tag_of(request_id: str) -> str | None:
    """Return the tag of the tenant whose id this can be; None for what no gateway has queued."""
    return request_id[:TAG_LENGTH] if _OWN_ID.match(request_id) else None


def submitted_at(request_id: str) -> datetime | None:
    """Return the time that an id begins with; None where it has none."""
    kind, digits = request_id[TAG_LENGTH + 1 :][:1], request_id[TAG_LENGTH + 2 :][:_TIME]
    if kind != TIMED or not re.fullmatch(f"[0-9a-f]{{{_TIME}}}", digits):
        return None
    milliseconds = int(digits, 16)
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds < _YEAR_9999 else None
