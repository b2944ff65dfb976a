"""Configuration of the object store: address, credentials, allowed inputs and timeouts."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from minio.helpers import BaseURL, check_bucket_name

from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings, SettingsError, is_plain, without_last_dot

UPLOADS = "uploads"  # last part of the prefix of all files that senders upload
_MAX_URL_TTL = 7 * 86_400  # seconds; S3's limit for presigned URLs


class StoreMisconfigured(StoreUnavailable):
    """A permanent failure: a credential, the store or its policy must be changed first."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Configuration of `ObjectStoreArtifacts`.

    Attributes:
        endpoint: `http(s)://host[:port]`.
        prefix: Prefix of the keys of all outputs, without slashes around it; may be empty.
        region: Part of every signature; most self-hosted stores accept any.
        public_endpoint: Endpoint in presigned URLs, if readers use another address than the worker.
        input_prefixes: `bucket/prefix` or `bucket` that requests may use for inputs. Empty allows
            the configured bucket and prefix.
        max_upload_bytes: Largest file that a sender may upload.
        input_hosts: `host` or `host:port` that requests may use for https inputs. Empty: none.
        url_ttl: Lifetime of a presigned URL in seconds, up to 7 days.
        connect_timeout: Seconds.
        read_timeout: Seconds between two received pieces of a response.
        attempt_timeout: Seconds for one attempt in total.
        deadline: Seconds for all attempts of one operation.
        first_pause: Limit of the pause after the first failed attempt, in seconds; doubled by each
            further one. The pause itself is a random value below the limit (full jitter).
        longest_pause: Seconds.

    Raises:
        SettingsError: Settings are wrong; the text has one line for each, with its name.
    """

    endpoint: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    bucket: str
    prefix: str = ""
    region: str = "us-east-1"
    public_endpoint: str | None = None
    input_prefixes: tuple[str, ...] = ()
    input_hosts: tuple[str, ...] = ()
    max_upload_bytes: int = 20 * 2**20
    url_ttl: int = 86_400
    connect_timeout: float = 2.0
    read_timeout: float = 20.0
    attempt_timeout: float = 30.0
    deadline: float = 60.0
    first_pause: float = 0.2
    longest_pause: float = 5.0

    def __post_init__(self) -> None:
        if wrong := list(self._wrong_settings()):
            raise SettingsError("\n".join(wrong))

    def _wrong_settings(self) -> Iterator[str]:
        for name, key in (("ACCESS", self.access_key), ("SECRET", self.secret_key)):
            if not key:  # the SDK would send anonymous requests
                yield f"S3_{name}_KEY: set it to the {name.lower()} key of the store"
        try:
            check_bucket_name(self.bucket, strict=True)
        except ValueError as error:
            yield f"S3_BUCKET: {error}"
        localhost = "http://localhost"  # any valid address
        for name, endpoint, region in (
            ("S3_ENDPOINT", self.endpoint, ""),
            ("S3_PUBLIC_ENDPOINT", self.public_endpoint, ""),
            ("S3_REGION", localhost, self.region),
        ):
            try:
                BaseURL(localhost if endpoint is None else endpoint, region)
            except ValueError as error:
                yield f"{name}: {error}"
        if not 1 <= self.url_ttl <= _MAX_URL_TTL:
            yield f"S3_URL_TTL: must be 1 to {_MAX_URL_TTL} seconds"
        if self.prefix and not is_plain(self.prefix):
            yield "S3_PREFIX: must be names between slashes"

    @property
    def url_endpoint(self) -> str:
        """Endpoint in presigned URLs."""
        return without_last_dot(self.public_endpoint or self.endpoint)

    def key(self, *parts: str) -> str:
        """Return an object key under the prefix."""
        return "/".join((self.prefix, *parts) if self.prefix else parts)

    def may_read(self, bucket: str, key: str) -> bool:
        """Return whether requests may use this object as an input.

        Uploads are always allowed: their keys are random, and each is known to its sender only.
        """
        uploads = f"{self.bucket}/{self.key(UPLOADS)}"
        for allowed in (*(self.input_prefixes or (f"{self.bucket}/{self.prefix}",)), uploads):
            allowed_bucket, _, prefix = allowed.rstrip("/").partition("/")
            # With the slash: the prefix `outputs` must not allow `outputs-of-others`.
            if bucket == allowed_bucket and (not prefix or key.startswith(f"{prefix}/")):
                return True
        return False


def store_config(settings: Settings) -> StoreConfig:
    """Create the configuration from the settings.

    Raises:
        SettingsError: Settings are wrong; the text has one line for each, with its name.
    """
    return StoreConfig(
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        region=settings.s3_region,
        public_endpoint=settings.s3_public_endpoint,
        input_prefixes=settings.input_prefixes,
        input_hosts=settings.consumer_input_hosts,
        max_upload_bytes=settings.consumer_max_input_bytes,
        url_ttl=settings.s3_url_ttl,
    )
