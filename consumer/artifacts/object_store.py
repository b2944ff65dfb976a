"""The object store: stores outputs, fetches inputs and checks the store, with the MinIO SDK.

The SDK blocks and has no total timeout. Therefore each call runs in a thread and is aborted at its
deadline. Retries are made here and not in urllib3: each attempt has a new signature, the observer
is notified of each failure, and the error code of the store is available. Keys are derived from the
request id and the content, so that storing an output twice has no further effect.
"""

import asyncio
import base64
import binascii
import hashlib
import os
import random
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog
from minio.datatypes import PostPolicy
from minio.error import MinioException, S3Error
from minio.helpers import DictType
from pydantic import ValidationError
from urllib3.response import BaseHTTPResponse

from consumer.artifacts.calls import Calls, connection_pools
from consumer.artifacts.config import UPLOADS, StoreConfig, StoreMisconfigured
from consumer.artifacts.faults import (
    AMBIGUOUS_REFUSALS,
    FAILURES,
    UnexpectedResponse,
    checksum_refusal,
    classify_error,
    with_address,
)
from consumer.artifacts.lifecycle import expire_uploads
from consumer.artifacts.minio_internals import CHECKSUM, store_client
from consumer.artifacts.web_inputs import WebInputs
from consumer.ports.media import EncodedFile, EncodedImage, InputUnavailable
from consumer.ports.store import StoreUnavailable, UploadTooLarge
from consumer.ports.telemetry import Observer
from consumer.settings import is_plain
from generation_contracts import (
    ArtifactReference,
    FileArtifact,
    ImageArtifact,
    InlineImage,
    StoredArtifact,
    UploadReply,
    UploadRequest,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.subjects import is_request_id

log = structlog.get_logger()

T = TypeVar("T")

# Bytes; smaller objects are stored with one PUT, and their ETag is the MD5. SDK default: 5 MiB.
_PART_SIZE = 64 * 2**20
DIGITS = 8  # of the SHA-256 in a key, to distinguish outputs of different runs of one request
_UPLOAD_TTL = timedelta(minutes=10)  # a slow link needs minutes for 20 MiB
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_CHECK_TIMEOUT = 5.0  # seconds for one small operation
_INPUT_TIMEOUT = 15.0  # seconds for all attempts at one input, because the device may wait for it
_MD5 = re.compile(r"[0-9a-f]{32}\Z")
_MIN_SIZE_FOR_THREAD = 2**18  # bytes, which take 0.3 ms to hash
_PROBE = b"generation consumer: the store works\n"

_INPUT_FAULTS = {  # by S3 code; the texts are sent to the sender
    "AccessDenied": "this worker may not read the object",
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "the object does not exist",
    "PreconditionFailed": "the object changed while it was read",
}

# S3 codes that refuse this worker, not the object.
_WORKER_FAULTS = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)


class ObjectStoreArtifacts:
    """The object store (`ports.Artifacts`); one per process, used in one event loop.

    Args:
        config: Configuration of the store.
        observer: Notified after each attempt whether the store has answered.

    Attributes:
        refused_checksum: Code with which the store has refused `x-amz-checksum-sha256`, which some
            stores do not support; empty if it has not. `probe` finds out.
    """

    def __init__(self, config: StoreConfig, *, observer: Observer) -> None:
        self.refused_checksum = ""
        self._checksum_in_doubt = False  # the last upload with a checksum was refused ambiguously
        self._config = config
        self._observer = observer
        self._calls = Calls()
        self._web = WebInputs(config.input_hosts, self._calls) if config.input_hosts else None
        self._hashing = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="hashing")
        self._pools = connection_pools(
            connect_timeout=config.connect_timeout, read_timeout=config.read_timeout
        )
        self._client = store_client(config, config.endpoint, self._pools)
        # The signature contains the host. This client only signs URLs and opens no connection.
        self._presigner = store_client(config, config.url_endpoint, self._pools)

    # -- the port ---------------------------------------------------------------------------------

    async def store(
        self, queue: str, request_id: str, index: int, file: EncodedFile
    ) -> ImageArtifact | FileArtifact:
        """Store one output under `<prefix>/<queue>/<request_id>/<index>-<sha256>.<extension>`.

        The key has the first digits of the SHA-256. Two workers may run the same request (a lease
        expired, or two requests have one id), and neither may change an object that the event of
        the other refers to.

        Raises:
            StoreUnavailable: Not stored within the deadline.
            StoreMisconfigured: A permanent failure; raised without a retry.
            ValueError: The request id cannot be part of a key.
        """
        if not is_request_id(request_id):
            raise ValueError("a request id is 1-64 characters of A-Z a-z 0-9 _ -")
        bucket = self._config.bucket
        key = self._config.key(
            queue, request_id, f"{index}-{file.sha256[:DIGITS]}.{file.extension}"
        )
        put = partial(self._put, file.media_type, md5=self._md5(file.data), sha256=file.sha256)
        etag = await self._run(partial(put, key, file.data))
        signed_at = datetime.now(UTC).replace(microsecond=0)  # signatures have whole seconds
        lifetime = timedelta(seconds=self._config.url_ttl)
        stored: dict[str, Any] = {
            "bucket": bucket,
            "key": key,
            "url": self._presigner.get_presigned_url(
                "GET", bucket, key, expires=lifetime, request_date=signed_at
            ),
            "url_expires_at": signed_at + lifetime,
            "etag": etag,
            "sha256": file.sha256,
            "size": len(file.data),
            "media_type": file.media_type,
        }
        if not isinstance(file, EncodedImage):
            return FileArtifact(**stored)
        image = {"width": file.width, "height": file.height, "seed": file.seed}
        return ImageArtifact(**stored, **image, marks=file.marks)

    async def fetch(self, source: ImageSource, *, max_bytes: int) -> bytes:
        """Return the bytes of one input image, from the store, the request or an allowed host.

        Raises:
            InputUnavailable: It is missing or too large, or this worker may not read it.
            StoreUnavailable: Not read from the store within the deadline.
            StoreMisconfigured: The store refuses this worker; raised without a retry.
        """
        if isinstance(source, str) and source.startswith(("http:", "https:")):
            if self._web is None:
                raise InputUnavailable("http inputs are not enabled on this worker")
            return await self._web.fetch(source, max_bytes=max_bytes)
        found = _content_or_reference(source, max_bytes)
        if isinstance(found, bytes):
            return found
        if not is_plain(found.key):  # the SDK raises a plain ValueError for some of these keys
            raise InputUnavailable("the key has an empty, `.` or `..` part")
        if not self._config.may_read(found.bucket, found.key):
            raise InputUnavailable("this worker reads no inputs from that bucket and prefix")
        read = partial(self._read, found.bucket, found.key, max_bytes)
        return await self._run(read, within=min(_INPUT_TIMEOUT, self._config.deadline))

    async def discard(self, artifact: StoredArtifact) -> None:
        """Delete an output that no event refers to, with one attempt. Never raises."""
        remove = partial(self._client.remove_object, artifact.bucket, artifact.key)
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                await self._calls.run(remove)
        except (StoreUnavailable, *FAILURES) as error:
            # The output may stay, because no event refers to it. The permission to delete is
            # optional, so the failure does not count as one of the store.
            log.warning("output_not_discarded", key=artifact.key, error=type(error).__name__)

    def sign_upload(self, upload: UploadRequest) -> UploadReply:
        """Sign an HTTP POST form for one file under `<prefix>/uploads/`; opens no connection.

        The signed policy allows one random key, the declared size and media type, and ten minutes.

        Raises:
            UploadTooLarge: The file exceeds `max_upload_bytes`.
        """
        config = self._config
        if upload.size > config.max_upload_bytes:
            raise UploadTooLarge(f"size: the image has more than {config.max_upload_bytes} bytes")
        name = f"{secrets.token_hex(16)}.{_EXTENSIONS[upload.media_type]}"
        key = config.key(UPLOADS, name)
        expires_at = datetime.now(UTC).replace(microsecond=0) + _UPLOAD_TTL
        policy = PostPolicy(config.bucket, expires_at)
        policy.add_equals_condition("key", key)
        policy.add_equals_condition("Content-Type", upload.media_type)
        policy.add_content_length_range_condition(upload.size, upload.size)
        signed = self._presigner.presigned_post_policy(policy)
        return UploadReply(
            url=self._bucket_url(key),
            fields={"key": key, "Content-Type": upload.media_type, **signed},
            expires_at=expires_at,
            bucket=config.bucket,
            key=key,
        )

    def _bucket_url(self, key: str) -> str:
        # The SDK alone knows where the bucket is in an address: in the path, or in the host of AWS.
        url = urlsplit(self._presigner.get_presigned_url("GET", self._config.bucket, key))
        return f"{url.scheme}://{url.netloc}{url.path.removesuffix(key)}"

    # -- checks for the start, the readiness and the commands -------------------------------------

    async def ensure_bucket(self, *, within: float | None = None) -> bool:
        """Create the bucket if it is missing; for `consumer apply` and development only.

        Args:
            within: Seconds for all attempts; None: the deadline of the configuration.

        Returns:
            Whether it was created.

        Raises:
            StoreUnavailable: The store does not answer.
            StoreMisconfigured: One clear line about what is wrong.
        """
        return await self._run(self._make_bucket, within=within)

    async def expire_uploads(self) -> bool:
        """Let the store delete uploads after a day; for `consumer apply` and development only.

        Other rules of the bucket stay.

        Returns:
            Whether a rule was added or changed.

        Raises:
            StoreUnavailable: The store does not answer.
            StoreMisconfigured: The store has no lifecycle rules, or refuses them to this user.
        """
        bucket, prefix = self._config.bucket, f"{self._config.key(UPLOADS)}/"
        return await self._run(partial(expire_uploads, self._client, bucket, prefix))

    async def probe(self, *, within: float = 10.0) -> None:
        """Write, read and delete one small object under the prefix.

        The permission to delete is optional; without it, discarded outputs stay in the store.

        Args:
            within: Seconds for all attempts.

        Raises:
            StoreUnavailable: The store does not answer.
            StoreMisconfigured: One clear line about what is wrong.
        """
        await self._run(self._write_read_delete, within=within)

    async def reachable(self) -> bool:
        """Return whether the store accepts this worker, with one attempt of one small read."""
        try:
            await self._run(self._read_probe, within=_CHECK_TIMEOUT, retry=False)
        except StoreUnavailable:
            return False
        return True

    async def close(self) -> None:
        """Abort all calls, and release threads and connections."""
        self._calls.close()
        self._hashing.shutdown(wait=False)
        self._pools.clear()

    # -- attempts ---------------------------------------------------------------------------------

    async def _run(
        self, work: Callable[[], T], *, within: float | None = None, retry: bool = True
    ) -> T:
        """Run `work` in a thread; with `retry`, repeat it after transient failures."""
        config = self._config
        now = asyncio.get_running_loop().time
        deadline = now() + (config.deadline if within is None else within)
        longest = config.first_pause
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, now() + config.attempt_timeout)):
                    result = await self._calls.run(work)
            except InputUnavailable:  # the store has answered
                self._observer.store_reachable(reachable=True)
                raise
            except FAILURES as error:
                fault = classify_error(error, config)
            else:
                self._observer.store_reachable(reachable=True)
                return result
            reason = with_address(fault, config.endpoint)
            self._observer.store_reachable(reachable=False, reason=reason)
            pause = random.uniform(0, longest)  # noqa: S311 - jitter
            permanent = isinstance(fault, StoreMisconfigured)
            if permanent or not retry or now() + pause >= deadline:
                raise fault
            await asyncio.sleep(pause)
            longest = min(2 * longest, config.longest_pause)

    # -- calls in a thread ------------------------------------------------------------------------

    def _md5(self, data: bytes) -> Callable[[], str]:
        """Return a function that returns the hex MD5; for large data, hash during the upload."""
        if len(data) < _MIN_SIZE_FOR_THREAD:
            return partial(_md5, data)
        return self._hashing.submit(_md5, data).result

    def _put(
        self,
        content_type: str,
        key: str,
        data: bytes,
        *,
        md5: Callable[[], str],
        sha256: str,
        probing: bool = False,
    ) -> str:
        """Put once, with a SHA-256 if the store supports it; return the ETag.

        Each tested store supports at least one of the two checks, SHA-256 and ETag. An ambiguous
        refusal is final after a probe or two consecutive uploads; before, it affects one upload.
        """
        put = partial(self._put_once, content_type, key, data, md5=md5)
        if self.refused_checksum:
            return put({})
        try:
            etag = put({CHECKSUM: base64.b64encode(bytes.fromhex(sha256)).decode()})
        except MinioException as error:
            code = checksum_refusal(error)
            if code is None:
                raise
        else:
            self._checksum_in_doubt = False
            return etag
        etag = put({})
        certain = probing or self._checksum_in_doubt or code not in AMBIGUOUS_REFUSALS
        self._checksum_in_doubt = True
        if certain and not self.refused_checksum:  # another thread may have set it
            self.refused_checksum = code
            log.warning("store_without_checksums", code=code, fallback="Content-MD5 and ETag")
        return etag

    def _put_once(
        self,
        content_type: str,
        key: str,
        data: bytes,
        checksum: DictType,
        *,
        md5: Callable[[], str],
    ) -> str:
        result = self._client.put_object(
            self._config.bucket,
            key,
            BytesIO(data),
            len(data),
            content_type=content_type,
            metadata=checksum,
            part_size=_PART_SIZE,
            num_parallel_uploads=1,  # more would run in threads that cannot be aborted
        )
        if not result.etag:  # for example a proxy's page with status 200
            raise UnexpectedResponse("the answer has no ETag")
        headers = result.http_headers
        encryption = headers.get("x-amz-server-side-encryption", "") if headers else ""
        # With SSE-KMS the ETag has the form of an MD5 but is not one.
        is_md5 = _MD5.match(result.etag) and not encryption.startswith("aws:kms")
        if is_md5 and result.etag != md5():
            raise UnexpectedResponse("the ETag is not the MD5 of what was sent")
        return result.etag

    def _read(self, bucket: str, key: str, max_bytes: int) -> bytes:
        try:
            size, etag = self._stat(bucket, key)
            if size > max_bytes:
                raise InputUnavailable(f"the object has more than {max_bytes} bytes")
            return self._get(bucket, key, size, etag)
        except S3Error as error:
            text = _INPUT_FAULTS.get(error.code or "")
            if error.code == "NoSuchKey" and "%" in key:
                text = "the object does not exist; keys are not percent-decoded"
            if text is None:
                transient = not isinstance(classify_error(error, self._config), StoreMisconfigured)
                if transient or error.code in _WORKER_FAULTS:
                    raise
                # Permanent: an archived or encrypted object, or a delete marker.
                text = "the store refuses the object"
        raise InputUnavailable(text)

    def _stat(self, bucket: str, key: str) -> tuple[int, str]:
        """Return the size in bytes and the ETag."""
        try:
            found = self._client.stat_object(bucket, key)
        except S3Error as error:
            if error.code == "AccessDenied":
                # The response to a HEAD has no body. Only a GET shows whether the credentials of
                # this worker are wrong.
                _body(self._client.get_object(bucket, key, length=1), 1)
            raise
        if found.size is None or not found.etag:
            raise UnexpectedResponse("the answer has no size or no ETag")
        return found.size, found.etag

    def _get(self, bucket: str, key: str, size: int, etag: str) -> bytes:
        unchanged: DictType = {"If-Match": f'"{etag}"'}
        data = _body(self._client.get_object(bucket, key, request_headers=unchanged), size + 1)
        if len(data) != size:
            raise UnexpectedResponse("the object was cut short")
        return data

    def _make_bucket(self) -> bool:
        bucket = self._config.bucket
        try:
            self._client.make_bucket(bucket)
        except S3Error as error:
            if error.code == "AccessDenied":
                # Credentials without the permission to create the bucket: it must exist.
                self._write_read_delete()
                return False
            known = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
            if error.code not in known or not self._client.bucket_exists(bucket):
                raise
            return False
        return True

    def _write_read_delete(self) -> None:
        # One of 65,536 keys: workers that start together use different keys, and without the
        # permission to delete, the number of objects stays limited.
        key = self._config.key(f"probe-{secrets.token_hex(2)}")
        sha256 = hashlib.sha256(_PROBE).hexdigest()
        put = partial(self._put, "text/plain", key, _PROBE, md5=partial(_md5, _PROBE))
        etag = put(sha256=sha256, probing=True)
        if self._get(self._config.bucket, key, len(_PROBE), etag) != _PROBE:
            raise UnexpectedResponse("what was written is not what is read")
        try:
            self._client.remove_object(self._config.bucket, key)
        except S3Error as error:
            if error.code != "AccessDenied":
                raise

    def _read_probe(self) -> None:
        try:
            _body(self._client.get_object(self._config.bucket, self._config.key("probe")), 1)
        except S3Error as error:
            # Without the permission to list, AWS returns AccessDenied for a missing object.
            if error.code not in {"NoSuchKey", "AccessDenied"}:
                raise


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _body(response: BaseHTTPResponse, limit: int) -> bytes:
    """Read up to `limit` bytes of a response, and return the connection to its pool."""
    try:
        # Without decoding: a gzip object could expand without a limit.
        return response.read(limit, decode_content=False)
    finally:
        response.close()
        response.release_conn()


def _content_or_reference(source: ImageSource, max_bytes: int) -> bytes | ArtifactReference:
    """Return the bytes of an inline image, else the reference to the object."""
    if isinstance(source, ArtifactReference):
        return source
    if isinstance(source, InlineImage):
        return _from_base64(source.base64, max_bytes)
    scheme, _, rest = source.partition(":")  # the contract allows only `data` and `s3`
    if scheme == "data":
        return _from_base64(rest.partition(",")[2], max_bytes)
    bucket, _, key = rest.removeprefix("//").partition("/")
    try:
        return ArtifactReference(bucket=bucket, key=key)
    except ValidationError:
        raise InputUnavailable("not an address of the form s3://bucket/key") from None


def _from_base64(text: str, max_bytes: int) -> bytes:
    if len(text) // 4 * 3 - text[-2:].count("=") > max_bytes:
        raise InputUnavailable(f"the image has more than {max_bytes} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise InputUnavailable("the image is not valid base64") from None
