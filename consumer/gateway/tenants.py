"""Tenants and their API keys: who a caller is, and how much it may ask for."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

TAG_LENGTH = 8  # characters of [a-z0-9]; every request id of a tenant begins with its tag
IDEMPOTENT = "k"  # after the tag: the id is derived from an idempotency key
TIMED = "t"  # after the tag: the id begins with the time of its submission
OPEN_TAG = "open0000"
_RANDOM = 16  # hexadecimal characters
_TIME = 12  # hexadecimal characters of milliseconds since 1970
_OWN_ID = re.compile(r"[a-z0-9]{8}-[kt][A-Za-z0-9_-]{1,54}\Z")


@dataclass(frozen=True)
class Bounds:
    """How much one key may ask for; None: without bound.

    Attributes:
        waiting: Requests that wait or run at the same time.
        per_minute: Requests in a minute.
        pixels: Width times height of one picture.
        steps: Denoising steps of one request.
        images: Pictures of one request.
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
        secret: Makes request ids out of idempotency keys, so that nobody can guess them.
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
