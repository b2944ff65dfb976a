"""API keys: the key file, and the check of a request's key.

The file is JSON with the SHA-256 of each key, never the key. A key has 256 random bits, so its hash
cannot be reversed by guessing. `consumer gateway keys` writes the file; a running gateway reads it
again after a change.
"""

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Literal

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from consumer.gateway.errors import UNAVAILABLE_RETRY_AFTER, ApiError
from consumer.gateway.file_state import file_state
from consumer.gateway.tenants import OPEN_TAG, TAG_LENGTH, Bounds, Caller, Tenant
from consumer.settings import SettingsError

log = structlog.get_logger()

KEY_BYTES = 32  # random bytes of a key
TENANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
OPEN_CALLER = Caller(Tenant("open", OPEN_TAG, b"open"))  # without keys there is nothing to protect

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_KEY = re.compile(r"gk_([a-z0-9]{8})_[A-Za-z0-9_-]{43}\Z")
_PRIVATE = 0o600

AtLeastOne = Annotated[int, Field(ge=1)]


class KeysUnusable(SettingsError):  # noqa: N818 - names what has happened
    """The key file cannot be read or is damaged; the text is one line."""


class KeyUnknown(SettingsError):  # noqa: N818 - names what has happened
    """No key has this id."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class KeyBounds(_Part):
    """`Bounds` in the key file."""

    waiting: AtLeastOne | None = None
    per_minute: AtLeastOne | None = None
    pixels: AtLeastOne | None = None
    steps: AtLeastOne | None = None
    images: AtLeastOne | None = None


class TenantEntry(_Part):
    """One tenant in the file. It remains without keys, because its jobs belong to its tag."""

    tag: Annotated[str, Field(pattern=rf"^[a-z0-9]{{{TAG_LENGTH}}}$")]
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(repr=False)


class KeyEntry(_Part):
    """One key in the file."""

    tenant: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(repr=False)
    created: Annotated[AwareDatetime, Field(strict=False)]
    bounds: KeyBounds = KeyBounds()


class Document(_Part):
    """The whole file: tenants by name, keys by id."""

    version: Literal[1] = 1
    tenants: dict[Annotated[str, Field(pattern=TENANT_NAME)], TenantEntry] = {}
    keys: dict[Annotated[str, Field(pattern=r"^[a-z0-9]{8}$")], KeyEntry] = {}


@dataclass(frozen=True)
class NewKey:
    """A new key.

    Attributes:
        text: The key that the caller sends; it is not stored.
    """

    id: str
    text: str


class KeyFile:
    """The key file on disk.

    Args:
        path: Path of the file; the first `add` creates it with mode 0600.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Document:
        """Read the file.

        Raises:
            KeysUnusable: The file is missing, unreadable, damaged or world-writable.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                    raise KeysUnusable(f"GATEWAY_KEYS: {self.path}: every user may write to it")
                content = file.read()
        except OSError as error:
            raise KeysUnusable(f"GATEWAY_KEYS: {self.path}: {error.strerror}") from None
        return _parsed(self.path, content)

    def add(self, tenant: str, bounds: Bounds) -> NewKey:
        """Add a key to a tenant, and create the tenant if it does not exist.

        Raises:
            KeysUnusable: The file or its folder cannot be used.
            SettingsError: The name of the tenant is invalid.
        """
        if not re.fullmatch(TENANT_NAME, tenant):
            raise SettingsError("TENANT: 1-64 characters of A-Z a-z 0-9 . _ -")
        with self._changing() as document:
            if tenant not in document.tenants:
                tags = {entry.tag for entry in document.tenants.values()} | {OPEN_TAG}
                document.tenants[tenant] = TenantEntry(
                    tag=_unused(tags), secret=secrets.token_hex(32)
                )
            key_id = _unused(set(document.keys))
            text = f"gk_{key_id}_{_random_text()}"
            document.keys[key_id] = KeyEntry(
                tenant=tenant,
                sha256=hash_of(text),
                created=datetime.now(UTC).replace(microsecond=0),
                bounds=KeyBounds(**vars(bounds)),
            )
        return NewKey(key_id, text)

    def revoke(self, key: str) -> str:
        """Remove a key.

        Args:
            key: Its id, or the key itself.

        Returns:
            The key's id.

        Raises:
            KeyUnknown: There is no such key.
            KeysUnusable: The file or its folder cannot be used.
        """
        whole = _KEY.match(key)
        key_id = whole.group(1) if whole else key
        with self._changing(create=False) as document:
            if document.keys.pop(key_id, None) is None:
                raise KeyUnknown("there is no key of this id")
        return key_id

    @contextmanager
    def _changing(self, *, create: bool = True) -> Iterator[Document]:
        """Yield the content of the file for changes, then write it, under an exclusive lock."""
        lock_path = self.path.with_name(f"{self.path.name}.lock")
        try:
            # A separate lock file: writing replaces the key file, which would lose a lock on it.
            with open(  # Path.open takes no opener, which sets the mode from the start
                lock_path, "a", opener=lambda path, flags: os.open(path, flags, _PRIVATE)
            ) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                is_new = create and not self.path.exists()
                document = Document() if is_new else self.read()
                yield document
                self._write(document)
        except OSError as error:
            raise KeysUnusable(f"GATEWAY_KEYS: {self.path}: {error.strerror}") from None

    def _write(self, document: Document) -> None:
        """Replace the file atomically; keep its owner and mode."""
        target = self.path.resolve()  # replace the target of a symbolic link, not the link
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(handle, "w") as file:
                if target.exists():
                    before = target.stat()
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                    if os.geteuid() == 0:
                        os.fchown(file.fileno(), before.st_uid, before.st_gid)
                text = document.model_dump_json(indent=2, exclude_defaults=True)
                # `version` has its default, so exclude_defaults has removed it.
                file.write(json.dumps({"version": 1, **json.loads(text)}, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(target)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


class Keys:
    """The keys of a running gateway.

    Args:
        path: The key file; None: no keys are needed, and every caller is the open tenant.

    Raises:
        KeysUnusable: The file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else KeyFile(path)
        self._seen = None if path is None else file_state(path)
        self._callers = {} if self._file is None else _callers(self._file.read())
        self.usable = True  # whether the last read of the file succeeded
        self._logged = ""  # the last logged reason; a repeated reason is not logged again

    @property
    def open(self) -> bool:
        """Whether callers need no key."""
        return self._file is None

    def caller(self, authorization: str | None) -> Caller:
        """Return the caller of a request.

        Args:
            authorization: The value of the header `Authorization`.

        Raises:
            ApiError: 401 without a valid key; 503 while the file cannot be used.
        """
        if self._file is None:
            return OPEN_CALLER
        self.reload()
        if not self.usable:
            # The change that cannot be read may have revoked keys that were valid before.
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the gateway cannot read its API keys: try again later",
                "unavailable",
                retry_after=UNAVAILABLE_RETRY_AFTER,
            )
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _Unauthorized("an API key is needed: send Authorization: Bearer with it")
        shape = _KEY.match(key)
        expected, caller = self._callers.get(shape.group(1) if shape else "", ("", OPEN_CALLER))
        if not hmac.compare_digest(hash_of(key), expected):
            raise _Unauthorized("the API key is not valid")
        return caller

    def reload(self) -> None:
        """Read the file again if it has changed, or if the last read failed."""
        if self._file is None:
            return
        seen = file_state(self._file.path)
        if seen == self._seen and seen is not None and self.usable:
            return
        self._seen = seen
        try:
            self._callers = _callers(self._file.read())
        except KeysUnusable as error:
            self._callers, self.usable = {}, False
            if str(error) != self._logged:
                log.error("gateway_keys_unusable", reason=str(error))  # noqa: TRY400 - one line
            self._logged = str(error)
            return
        self.usable, self._logged = True, ""
        log.info("gateway_keys_read", keys=len(self._callers))


class _Unauthorized(ApiError):  # noqa: N818 - as ApiError's other causes
    """401: the caller sent no valid key."""

    def __init__(self, message: str) -> None:
        super().__init__(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key")

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response, with the authentication scheme."""
        return {**super().headers, "www-authenticate": "Bearer"}


_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="API key",
    description="A key that `consumer gateway keys add` has printed. Without keys: none is needed.",
)


async def authenticate(
    request: Request,
    _described: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Return the caller of a request: a dependency of every route that needs a key.

    The middleware `KeyCheck` has checked the key before the body was read.
    """
    caller: Caller = request.state.caller
    return caller


Authenticated = Annotated[Caller, Depends(authenticate)]


def hash_of(key: str) -> str:
    """Return the hash of a key, as in the key file."""
    return hashlib.sha256(key.encode()).hexdigest()


def _random_text() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=").decode()


def _unused(taken: set[str]) -> str:
    """Return a random id of eight characters that is not in use."""
    while True:
        drawn = "".join(secrets.choice(_ALPHABET) for _ in range(TAG_LENGTH))
        if drawn not in taken:
            return drawn


def _parsed(path: Path, content: bytes) -> Document:
    try:
        document = Document.model_validate_json(content.removeprefix(BOM_UTF8))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise KeysUnusable(f"GATEWAY_KEYS: {path}: is damaged: {what}") from None
    tags = [entry.tag for entry in document.tenants.values()]
    if len(set(tags)) < len(tags) or OPEN_TAG in tags:
        raise KeysUnusable(f"GATEWAY_KEYS: {path}: is damaged: two tenants have one tag")
    for key_id, entry in document.keys.items():
        if entry.tenant not in document.tenants:
            raise KeysUnusable(f"GATEWAY_KEYS: {path}: is damaged: key {key_id} has no tenant")
    return document


def _callers(document: Document) -> dict[str, tuple[str, Caller]]:
    """Return each key's hash and caller, by its id."""
    tenants = {
        name: Tenant(name, entry.tag, bytes.fromhex(entry.secret))
        for name, entry in document.tenants.items()
    }
    return {
        key_id: (
            entry.sha256,
            Caller(tenants[entry.tenant], key_id, Bounds(**entry.bounds.model_dump())),
        )
        for key_id, entry in document.keys.items()
    }
