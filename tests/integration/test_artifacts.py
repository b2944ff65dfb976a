"""Artifacts on a real S3 server, also behind a proxy that simulates faults of stores."""

import asyncio
import base64
import hashlib
import io
import json
import re
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import minio.api
import pytest
from minio import Minio
from PIL import Image
from pydantic import SecretStr
from structlog.testing import capture_logs

from consumer.app.probes import NullObserver
from consumer.artifacts import (
    ObjectStoreArtifacts,
    StoreConfig,
    StoreMisconfigured,
    store_config,
)
from consumer.devstack import ObjectStore
from consumer.devstack.loopback import free_ports
from consumer.media.codec import ImageCodec
from consumer.ports.media import EncodedImage, InputUnavailable
from consumer.ports.store import StoreUnavailable
from consumer.settings import Settings
from consumer.telemetry import JobReport
from generation_contracts import ArtifactReference, FailureCode, InlineImage, Task
from tests.contracts.test_image_sources import ODD_KEYS
from tests.integration import minio_server
from tests.integration.fault_proxy import (
    Exchange,
    Fault,
    FaultProxy,
    damages_the_body,
    drips,
    for_checksums,
    hangs_up,
    is_silent,
    passes,
    refuses,
    says,
)
from tests.integration.minio_server import MinioServer
from tests.support.plain_s3 import plain_s3_client

BUCKET = "generation"
PREFIX = "outputs"
LIMIT = 1_000_000  # bytes of an input
SOON = 30.0  # seconds; only bounds a wait for something that must happen
TASK = Task.TEXT_TO_IMAGE


# -- fixtures and helpers -------------------------------------------------------------------------


class StoreWithScopedUser(ObjectStore):
    """The development store with a second key pair that is limited to one prefix."""

    scoped_access_key = "worker"
    scoped_secret_key = "the-secret-of-the-worker"

    def _prepare(self) -> None:
        super()._prepare()
        file = self.directory / "s3.json"
        identities = json.loads(file.read_text())
        pair = {"accessKey": self.scoped_access_key, "secretKey": self.scoped_secret_key}
        objects = f"{BUCKET}/{PREFIX}/*"
        scoped = {
            "name": "worker",
            "credentials": [pair],
            "actions": [f"Read:{objects}", f"Write:{objects}"],
        }
        identities["identities"].append(scoped)
        file.write_text(json.dumps(identities))


@dataclass
class Recorder:
    """An observer that records the reports about the store."""

    reports: list[str] = field(default_factory=list)  # "" if reachable, else the reason
    queue: asyncio.Queue[str] = field(default_factory=asyncio.Queue)  # the reports, to await

    def job_started(self) -> None: ...
    def job_finished(self, report: JobReport) -> None: ...
    def chain_broken(self, code: FailureCode) -> None: ...
    def call_refused(self, code: FailureCode) -> None: ...
    def device_stepped(self) -> None: ...
    def device_busy(self, seconds: float) -> None: ...

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        assert reachable == (not reason)
        assert threading.current_thread() is threading.main_thread()
        text, addresses = re.subn(r"^S3 at https?://127\.0\.0\.1:\d+: ", "S3: ", reason)
        assert addresses == (not reachable)
        self.reports.append(text)
        self.queue.put_nowait(text)


@pytest.fixture(
    scope="module", params=["weed", *(["minio"] if minio_server.is_installed() else [])]
)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreWithScopedUser | MinioServer]:
    kind = StoreWithScopedUser if request.param == "weed" else MinioServer
    with kind(tmp_path_factory.mktemp("store")) as running:
        if isinstance(running, MinioServer):
            running.add_scoped_user(f"{BUCKET}/{PREFIX}/*")
        plain_s3_client(running).make_bucket(BUCKET)
        plain_s3_client(running).make_bucket("private")
        yield running


@pytest.fixture
def plain(store: ObjectStore | MinioServer) -> Minio:
    """Return a client of the store that shares no code with the product."""
    return plain_s3_client(store)


@pytest.fixture
async def proxy(store: ObjectStore | MinioServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(store.ports["s3.port"]) as running:
        yield running


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


Make = Callable[..., ObjectStoreArtifacts]


@pytest.fixture
async def make(store: StoreWithScopedUser | MinioServer, seen: Recorder) -> AsyncIterator[Make]:
    """Return a function that creates an adapter with a changed configuration."""
    async with AsyncExitStack() as parts:

        def create(**changes: Any) -> ObjectStoreArtifacts:
            artifacts = ObjectStoreArtifacts(config_for(store, **changes), observer=seen)
            parts.push_async_callback(artifacts.close)
            return artifacts

        yield create


@pytest.fixture
def artifacts(make: Make) -> ObjectStoreArtifacts:
    return make()


@pytest.fixture
def behind(make: Make, proxy: FaultProxy) -> ObjectStoreArtifacts:
    """Return an adapter that connects through the proxy."""
    return make(endpoint=proxy.endpoint)


def config_for(store: ObjectStore | MinioServer, **changes: Any) -> StoreConfig:
    values: dict[str, Any] = {
        "endpoint": store.endpoint,
        "access_key": store.access_key,
        "secret_key": store.secret_key,
        "bucket": BUCKET,
        "prefix": PREFIX,
        "first_pause": 0.01,
        "longest_pause": 0.05,
    }
    return StoreConfig(**(values | changes))


def encoded_image(shade: int = 120) -> EncodedImage:
    return ImageCodec().encode(Image.new("RGB", (48, 32), (shade, 40, 50)), "png", seed=7)


def put(plain: Minio, key: str, data: bytes, bucket: str = BUCKET, **options: Any) -> None:
    plain.put_object(bucket, key, io.BytesIO(data), len(data), **options)


def got(plain: Minio, key: str) -> bytes:
    response = plain.get_object(BUCKET, key)
    try:
        return bytes(response.read())
    finally:
        response.close()
        response.release_conn()


def read_url(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=SOON) as response:  # noqa: S310 - presigned, http
        return bytes(response.read())


def reference(key: str, bucket: str = BUCKET) -> ArtifactReference:
    return ArtifactReference(bucket=bucket, key=key)


async def input_error(artifacts: ObjectStoreArtifacts, source: Any, limit: int = LIMIT) -> str:
    with pytest.raises(InputUnavailable) as raised:
        await artifacts.fetch(source, max_bytes=limit)
    return str(raised.value)


# -- a store without checksums --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (refuses("501 Not Implemented", "NotImplemented"), "NotImplemented"),
        (refuses("400 Bad Request", "InvalidRequest"), "InvalidRequest"),
        (refuses("400 Bad Request", "InvalidArgument"), "InvalidArgument"),
        (refuses("403 Forbidden", "SignatureDoesNotMatch"), "SignatureDoesNotMatch"),
        (says("501 Not Implemented"), "HTTP 501"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_probe_detects_a_store_without_checksums(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, plain: Minio, fault: Fault, code: str
) -> None:
    proxy.otherwise = for_checksums(fault)
    with capture_logs() as logs:
        await behind.probe()
    assert behind.refused_checksum == code
    (line,) = logs
    assert (line["event"], line["code"]) == ("store_without_checksums", code)
    proxy.heads.clear()
    stored = await behind.store(TASK, "unchecked", 0, encoded_image())
    (head,) = proxy.heads  # one attempt, and the store compares the MD5
    md5 = base64.b64encode(hashlib.md5(encoded_image().data, usedforsecurity=False).digest())
    assert b"\r\nContent-MD5: " + md5 + b"\r\n" in head
    assert got(plain, stored.key) == encoded_image().data


@pytest.mark.parametrize(
    ("code", "uploads"),
    [
        ("InvalidRequest", 2),
        ("InvalidArgument", 2),
        ("SignatureDoesNotMatch", 2),
        ("NotImplemented", 1),
    ],
)
async def test_checksums_are_disabled_after_two_consecutive_ambiguous_refusals(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, plain: Minio, code: str, uploads: int
) -> None:
    refused = for_checksums(refuses("400 Bad Request", code))
    if uploads == 2:
        for _ in range(2):  # not consecutive: an upload with a checksum succeeds in between
            proxy.faults.append(refused)
            stored = await behind.store(TASK, f"ambiguous-{code}", 0, encoded_image())
            assert got(plain, stored.key) == encoded_image().data
            proxy.heads.clear()
            await behind.store(TASK, f"ambiguous-{code}", 1, encoded_image())
            assert [b"x-amz-checksum-sha256" in head for head in proxy.heads] == [True]
    proxy.otherwise = refused
    for _ in range(uploads):
        assert behind.refused_checksum == ""
        await behind.store(TASK, f"ambiguous-{code}", 2, encoded_image())
    assert behind.refused_checksum == code


async def test_damaged_bytes_do_not_disable_checksums(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.faults.extend(
        (refuses("400 Bad Request", "BadDigest"), refuses("503 Slow Down", "SlowDown"))
    )
    await behind.store(TASK, "damaged", 0, encoded_image())
    assert behind.refused_checksum == ""
    assert all(b"x-amz-checksum-sha256" in head for head in proxy.heads)


async def test_a_store_that_lacks_other_features_is_misconfigured(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.otherwise = refuses("501 Not Implemented", "NotImplemented")
    with pytest.raises(StoreMisconfigured, match=r"the store lacks what is needed \(NotImpl"):
        await behind.probe()
    assert behind.refused_checksum == ""


# -- outputs --------------------------------------------------------------------------------------


async def test_a_stored_image_is_readable_by_any_client(
    artifacts: ObjectStoreArtifacts, plain: Minio, seen: Recorder
) -> None:
    image = encoded_image()
    stored = await artifacts.store(TASK, "request-1", 3, image)

    assert (stored.bucket, stored.key) == (
        BUCKET,
        f"outputs/text_to_image/request-1/3-{image.sha256[:8]}.png",
    )
    found = plain.stat_object(BUCKET, stored.key)
    md5 = hashlib.md5(image.data, usedforsecurity=False).hexdigest()
    assert (found.size, found.etag) == (stored.size, stored.etag) == (len(image.data), md5)
    assert found.content_type == stored.media_type == "image/png"
    assert hashlib.sha256(got(plain, stored.key)).hexdigest() == stored.sha256
    assert (stored.width, stored.height, stored.seed) == (48, 32, 7)
    assert stored.marks == image.marks == ("iptc",)
    assert seen.reports == [""]


async def test_an_upload_has_the_media_type(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    """SeaweedFS derives a missing media type from the key; other stores do not."""
    await behind.store(TASK, "typed", 0, encoded_image())
    assert b"\r\nContent-Type: image/png\r\n" in proxy.heads[0]


async def test_the_sdk_does_not_hash_an_image_again(
    artifacts: ObjectStoreArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    for name in ("sha256_hash", "md5sum_hash"):
        original = getattr(minio.api, name)

        def counted(data: bytes | None, original: Any = original) -> Any:
            hashed.append(len(data or b""))
            return original(data)

        monkeypatch.setattr(minio.api, name, counted)
    await artifacts.store(TASK, "hashed", 0, encoded_image())
    assert sum(hashed) == 0


async def test_an_image_above_the_part_size_of_the_sdk_is_one_put(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    data = bytes(6 * 2**20)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    image = replace(encoded_image(), data=data, sha256=hashlib.sha256(data).hexdigest())
    stored = await artifacts.store(TASK, "large", 0, image)
    assert plain.stat_object(BUCKET, stored.key).etag == stored.etag == md5


async def test_an_image_that_is_stored_twice_is_one_object(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    first = await artifacts.store(TASK, "twice", 0, encoded_image())
    second = await artifacts.store(TASK, "twice", 0, encoded_image())
    assert (first.key, first.etag, first.sha256) == (second.key, second.etag, second.sha256)
    listed = plain.list_objects(BUCKET, prefix=f"{PREFIX}/text_to_image/twice/")
    assert [found.object_name for found in listed] == [first.key]


async def test_the_presigned_url_downloads_the_image_and_has_its_expiry(
    make: Make, plain: Minio
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    stored = await make(url_ttl=90).store(TASK, "url", 0, encoded_image())
    after = datetime.now(UTC)

    assert await asyncio.to_thread(read_url, stored.url) == encoded_image().data
    assert before <= stored.url_expires_at - timedelta(seconds=90) <= after
    query = parse_qs(urlsplit(stored.url).query)
    signed_at = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert signed_at + timedelta(seconds=int(query["X-Amz-Expires"][0])) == stored.url_expires_at


async def test_the_reported_expiry_of_the_url_is_that_of_its_signature(
    artifacts: ObjectStoreArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Earlier":
            return super().now(tz) - timedelta(seconds=100)

    monkeypatch.setattr("consumer.artifacts.object_store.datetime", Earlier)
    stored = await artifacts.store(TASK, "earlier", 0, encoded_image())
    signed = parse_qs(urlsplit(stored.url).query)["X-Amz-Date"][0]
    assert f"{stored.url_expires_at - timedelta(days=1):%Y%m%dT%H%M%SZ}" == signed


async def test_a_url_without_its_signature_is_refused(
    artifacts: ObjectStoreArtifacts,
) -> None:
    stored = await artifacts.store(TASK, "signed", 0, encoded_image())
    with pytest.raises(urllib.error.HTTPError, match="403"):
        await asyncio.to_thread(read_url, stored.url.partition("?")[0])


async def test_the_url_names_the_public_endpoint_and_works_there(
    make: Make, proxy: FaultProxy
) -> None:
    artifacts = make(public_endpoint=proxy.endpoint)
    stored = await artifacts.store(TASK, "public", 0, encoded_image())
    assert proxy.methods == []  # presigning sends no request
    assert stored.url.startswith(f"{proxy.endpoint}/generation/outputs/")
    assert await asyncio.to_thread(read_url, stored.url) == encoded_image().data
    assert proxy.methods == ["GET"]


@pytest.mark.parametrize("setting", ["s3_endpoint", "s3_public_endpoint"])
@pytest.mark.parametrize(
    ("endpoint", "sent"),
    [
        ("http://LocalHost:9000", "localhost:9000"),
        ("HTTP://Pictures.Example:80/", "pictures.example"),
        ("http://[::1]:9000", "[::1]:9000"),
        ("http://bücher.example", "xn--bcher-kva.example"),
        ("http://pictures.example.:9000", "pictures.example:9000"),
    ],
)
def test_the_url_is_signed_for_the_host_that_clients_send(
    store: StoreWithScopedUser | MinioServer, plain: Minio, setting: str, endpoint: str, sent: str
) -> None:
    put(plain, "outputs/hosts.png", b"a picture")
    settings = Settings(
        **{setting: endpoint},
        s3_access_key=store.access_key,
        s3_secret_key=SecretStr(store.secret_key),
    )
    artifacts = ObjectStoreArtifacts(store_config(settings), observer=NullObserver())
    url = urlsplit(artifacts._presigner.presigned_get_object(BUCKET, "outputs/hosts.png"))
    assert url.netloc == sent  # clients connect to this host and send it in the header
    request = urllib.request.Request(f"{store.endpoint}{url.path}?{url.query}")  # noqa: S310 - http
    request.add_header("Host", sent)
    with urllib.request.urlopen(request, timeout=SOON) as response:  # noqa: S310 - http
        assert response.read() == b"a picture"


@pytest.mark.parametrize("request_id", ["", "a.b", "a/b", "../a", "a b", "a\n", "x" * 65, "ü"])
async def test_an_invalid_request_id_is_refused(
    artifacts: ObjectStoreArtifacts, seen: Recorder, request_id: str
) -> None:
    with pytest.raises(ValueError, match="a request id is 1-64 characters"):
        await artifacts.store(TASK, request_id, 0, encoded_image())
    assert seen.reports == []


async def test_many_concurrent_uploads_are_stored(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    images = [encoded_image(shade) for shade in range(40)]
    stored = await asyncio.gather(
        *(artifacts.store(TASK, "many", index, image) for index, image in enumerate(images))
    )
    for image, found in zip(images, stored, strict=True):
        assert got(plain, found.key) == image.data


# -- inputs ---------------------------------------------------------------------------------------


async def test_an_output_is_fetched_by_its_reference_and_by_its_address(
    artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    stored = await artifacts.store(TASK, "chain", 0, encoded_image())
    by_reference = await artifacts.fetch(reference(stored.key), max_bytes=LIMIT)
    by_address = await artifacts.fetch(f"s3://{BUCKET}/{stored.key}", max_bytes=LIMIT)
    assert by_reference == by_address == encoded_image().data
    assert seen.reports == ["", "", ""]


async def test_inline_images_are_decoded(artifacts: ObjectStoreArtifacts, seen: Recorder) -> None:
    text = base64.b64encode(encoded_image().data).decode()
    assert await artifacts.fetch(InlineImage(base64=text), max_bytes=LIMIT) == encoded_image().data
    data_uri = f"data:image/png;base64,{text}"
    assert await artifacts.fetch(data_uri, max_bytes=LIMIT) == encoded_image().data
    assert seen.reports == []  # no call to the store


@pytest.mark.parametrize("size", [30, 31, 32])  # with two, one and no padding signs
async def test_the_size_of_an_inline_image_is_limited(
    artifacts: ObjectStoreArtifacts, size: int
) -> None:
    inline = InlineImage(base64=base64.b64encode(bytes(size)).decode())
    assert await artifacts.fetch(inline, max_bytes=size) == bytes(size)
    assert (
        await input_error(artifacts, inline, size - 1)
        == f"the image has more than {size - 1} bytes"
    )


DOTS = ["outputs/../private/0.png", "outputs/./0.png", "outputs//0.png", "outputs/", "outputs/.."]


@pytest.mark.parametrize(
    "key",
    [
        *DOTS,
        " ",
        "outputs/ ",
        "outputs/%2e%2e/x",
        "outputs/a/%2e%2e%20/b",
        "outputs%2F..%5cx",
        "outputs\\..\\x",
    ],
)
async def test_a_key_with_an_unsafe_part_is_refused(make: Make, key: str, seen: Recorder) -> None:
    """Also if the contract did not validate it, and a blank key, which the SDK refuses."""
    for artifacts in (make(), make(prefix="")):
        source = ArtifactReference.model_construct(bucket=BUCKET, key=key)
        assert await input_error(artifacts, source) == "the key has an empty, `.` or `..` part"
    assert seen.reports == []


OTHER_PLACE = "this worker reads no inputs from that bucket and prefix"
NO_HTTP = "http inputs are not enabled on this worker"
NO_ADDRESS = "not an address of the form s3://bucket/key"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        *(
            pytest.param(
                InlineImage.model_construct(base64=text),
                "the image is not valid base64",
                id=f"base64 {text}",
            )
            for text in ("abc", "abcde", "ab=", "abc===")
        ),
        pytest.param("http://127.0.0.1/x.png", NO_HTTP, id="http"),
        pytest.param("https://example.com/x.png", NO_HTTP, id="https"),
        pytest.param(reference("0.png", "private"), OTHER_PLACE, id="other bucket"),
        pytest.param(reference("private/0.png"), OTHER_PLACE, id="other prefix"),
        pytest.param(reference("outputs"), OTHER_PLACE, id="prefix alone"),
        pytest.param(reference("outputs-of-others/0.png"), OTHER_PLACE, id="longer prefix"),
        pytest.param("s3://private/outputs/0.png", OTHER_PLACE, id="address of other bucket"),
        *(
            pytest.param(f"s3://{BUCKET}/{key}", NO_ADDRESS, id=f"address {number}")
            for number, key in enumerate(
                [*DOTS, "outputs/a\nb", "outputs/a\\..\\b", "", "é" * 513], start=1
            )
        ),
    ],
)
async def test_an_invalid_input_is_refused_without_a_call_to_the_store(
    artifacts: ObjectStoreArtifacts, source: Any, message: str, seen: Recorder
) -> None:
    assert await input_error(artifacts, source) == message
    assert seen.reports == []


async def test_a_configured_input_prefix_can_be_read(make: Make, plain: Minio) -> None:
    put(plain, "photos/1.png", b"a photo", bucket="private")
    listed = make(input_prefixes=("private/photos",))
    assert await listed.fetch("s3://private/photos/1.png", max_bytes=LIMIT) == b"a photo"


async def test_unusual_keys_are_used_unchanged(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    for key in (f"{PREFIX}/{key}" for key in ODD_KEYS):
        put(plain, key, key.encode())
        for source in (reference(key), f"s3://{BUCKET}/{key}"):
            assert await artifacts.fetch(source, max_bytes=LIMIT) == key.encode()
    assert await input_error(artifacts, f"s3://{BUCKET}/{PREFIX}/in/Z%C3%BCrich.png") == (
        "the object does not exist; keys are not percent-decoded"
    )


async def test_a_missing_object_is_an_input_error(
    make: Make, artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    assert (
        await input_error(artifacts, reference("outputs/none.png")) == "the object does not exist"
    )
    elsewhere = make(input_prefixes=("no-such-bucket",))
    assert await input_error(elsewhere, reference("0.png", "no-such-bucket")) in {
        "the bucket does not exist",
        "the object does not exist",  # the answer to a HEAD does not distinguish them
    }
    assert seen.reports == ["", ""]  # the store is reachable


async def test_the_size_of_an_object_is_limited(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy
) -> None:
    put(plain, "outputs/size.bin", bytes(1000))
    source = reference("outputs/size.bin")
    assert await behind.fetch(source, max_bytes=1000) == bytes(1000)
    proxy.methods.clear()
    assert await input_error(behind, source, 999) == "the object has more than 999 bytes"
    assert proxy.methods == ["HEAD"]  # no request for the content


async def test_an_empty_object_is_empty(artifacts: ObjectStoreArtifacts, plain: Minio) -> None:
    put(plain, "outputs/empty", b"")
    assert await artifacts.fetch(reference("outputs/empty"), max_bytes=LIMIT) == b""


async def test_an_object_with_a_gzip_encoding_is_not_decompressed(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    put(plain, "outputs/packed", b"not gzip at all", metadata={"Content-Encoding": "gzip"})
    fetched = await artifacts.fetch(reference("outputs/packed"), max_bytes=LIMIT)
    assert fetched == b"not gzip at all"


async def test_an_object_that_changes_between_head_and_get_is_refused(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy
) -> None:
    async def swaps(exchange: Exchange) -> None:
        await asyncio.to_thread(put, plain, "outputs/swapped.png", bytes(2 * LIMIT))
        await passes(exchange)

    put(plain, "outputs/swapped.png", b"small")
    proxy.faults += [passes, swaps]
    source = reference("outputs/swapped.png")
    assert await input_error(behind, source) == "the object changed while it was read"
    assert proxy.methods == ["HEAD", "GET"]


async def test_a_truncated_answer_is_read_again(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy, seen: Recorder
) -> None:
    async def cuts(exchange: Exchange) -> None:
        exchange.writer.write((await exchange.forward())[:-10])

    async def lies(exchange: Exchange) -> None:
        await exchange.answer("200 OK", b"too short", ETag='"x"')

    put(plain, "outputs/cut.png", encoded_image().data)
    proxy.faults += [passes, cuts, passes, lies]
    fetched = await behind.fetch(reference("outputs/cut.png"), max_bytes=LIMIT)
    assert fetched == encoded_image().data
    assert seen.reports == ["S3: the object was cut short", "S3: the object was cut short", ""]


async def test_an_answer_without_an_etag_is_read_again(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy, seen: Recorder
) -> None:
    put(plain, "outputs/no-etag.png", encoded_image().data)
    proxy.faults.append(says("200 OK"))
    fetched = await behind.fetch(reference("outputs/no-etag.png"), max_bytes=LIMIT)
    assert fetched == encoded_image().data
    assert seen.reports == ["S3: the answer has no size or no ETag", ""]


async def test_no_more_than_the_announced_size_is_read(
    behind: ObjectStoreArtifacts, plain: Minio, proxy: FaultProxy
) -> None:
    sent = 0

    async def never_ends(exchange: Exchange) -> None:
        nonlocal sent
        exchange.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 200 * LIMIT:
            exchange.writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent += 0x10000
            await exchange.writer.drain()

    put(plain, "outputs/endless.png", encoded_image().data)
    times = 9  # one more than there are connections: each connection is released
    proxy.faults += [passes, never_ends] * times
    async with asyncio.timeout(SOON):
        fetched = await behind.fetch(reference("outputs/endless.png"), max_bytes=LIMIT)
        for _ in proxy.methods:
            await proxy.left.get()
    assert fetched == encoded_image().data
    assert sent < times * 20 * LIMIT  # limited by the buffers in between


async def test_refused_inputs_release_their_connections(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    put(plain, "outputs/once.png", b"x" * 100)
    for _ in range(12):  # more than there are connections
        await input_error(artifacts, reference("outputs/once.png"), 99)
        await input_error(artifacts, reference("outputs/none.png"))
    async with asyncio.timeout(SOON):
        assert len(await artifacts.fetch(reference("outputs/once.png"), max_bytes=100)) == 100


# -- a store that refuses -------------------------------------------------------------------------


async def test_a_missing_bucket_is_reported_and_ensure_bucket_creates_it(
    make: Make, seen: Recorder
) -> None:
    artifacts = make(bucket="made-here")
    line = 'S3: the bucket "made-here" does not exist; create it with consumer apply'
    for attempt in (artifacts.probe(), artifacts.store(TASK, "x", 0, encoded_image())):
        with pytest.raises(StoreMisconfigured) as raised:
            await attempt
        assert str(raised.value) == line
    assert seen.reports == [line, line]  # one report each, without waiting for the deadline

    assert await artifacts.ensure_bucket() is True
    assert await artifacts.ensure_bucket() is False
    await artifacts.probe()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"secret_key": "wrong-secret"}, "S3: the secret key is wrong"),
        ({"access_key": "wrong-access"}, "S3: the access key is not known"),
    ],
)
async def test_a_wrong_key_pair_is_reported_by_every_operation(
    make: Make, seen: Recorder, changes: dict[str, str], line: str
) -> None:
    artifacts = make(**changes)
    for attempt in (
        artifacts.probe(),
        artifacts.ensure_bucket(),
        artifacts.store(TASK, "x", 0, encoded_image()),
        artifacts.fetch(reference("outputs/none.png"), max_bytes=LIMIT),
    ):
        with pytest.raises(StoreMisconfigured) as raised:
            await attempt
        assert str(raised.value) == line
    assert await artifacts.reachable() is False
    assert seen.reports == [line] * 5


async def test_a_key_pair_for_one_prefix_is_enough(
    make: Make, store: StoreWithScopedUser | MinioServer, plain: Minio
) -> None:
    scoped = {"access_key": store.scoped_access_key, "secret_key": store.scoped_secret_key}
    artifacts = make(**scoped)
    await artifacts.probe()
    assert await artifacts.reachable() is True
    assert await artifacts.ensure_bucket() is False
    stored = await artifacts.store(TASK, "scoped", 0, encoded_image())
    assert await artifacts.fetch(reference(stored.key), max_bytes=LIMIT) == encoded_image().data

    put(plain, "photos/2.png", b"a photo", bucket="private")
    with_input_prefix = make(**scoped, input_prefixes=("private",))
    source = reference("photos/2.png", "private")
    assert await input_error(with_input_prefix, source) == "this worker may not read the object"

    elsewhere = make(**scoped, prefix="elsewhere")
    for attempt in (elsewhere.probe(), elsewhere.ensure_bucket()):
        with pytest.raises(StoreMisconfigured) as raised:
            await attempt
        assert str(raised.value) == (
            'S3: access is denied; reading and writing "generation/elsewhere/*" is needed'
        )


async def test_an_existing_bucket_must_be_accessible(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    exists = refuses("409 Conflict", "BucketAlreadyExists")
    proxy.faults += [exists, passes]
    assert await behind.ensure_bucket() is False
    proxy.faults += [exists, says("404 Not IdLookup")]
    with pytest.raises(StoreMisconfigured, match=r"the store refuses \(BucketAlreadyExists\)"):
        await behind.ensure_bucket()


async def test_a_store_that_denies_access_to_missing_objects_is_reachable(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    """AWS does so for users without the permission to list."""
    proxy.faults.append(refuses("403 Forbidden", "AccessDenied"))
    assert await behind.reachable() is True


async def test_a_probe_deletes_its_object(artifacts: ObjectStoreArtifacts, plain: Minio) -> None:
    await artifacts.probe()
    listed = plain.list_objects(BUCKET, prefix=f"{PREFIX}/probe", recursive=True)
    assert [found.object_name for found in listed] == []


async def test_a_worker_without_the_permission_to_delete_passes_the_probe(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.faults += [passes, passes, refuses("403 Forbidden", "AccessDenied")]
    await behind.probe()
    assert proxy.methods == ["PUT", "GET", "DELETE"]


async def test_a_probe_detects_a_store_that_returns_other_bytes(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, seen: Recorder
) -> None:
    async def alters(exchange: Exchange) -> None:
        answer = await exchange.forward()
        exchange.writer.write(answer[:-2] + b"?" + answer[-1:])

    proxy.faults += [passes, alters]
    await behind.probe()
    assert seen.reports == ["S3: what was written is not what is read", ""]


async def test_tls_to_a_store_without_tls_is_reported(make: Make, store: ObjectStore) -> None:
    with pytest.raises(StoreMisconfigured, match=r"^S3: TLS fails \([a-z0-9 ]+\)$"):
        await make(endpoint=store.endpoint.replace("http:", "https:")).probe()


# -- a store that fails ---------------------------------------------------------------------------

ETAG = '"00000000000000000000000000000000"'
PAGE = b"<html>all is well</html>"
FAILS: dict[str, tuple[Fault, str]] = {
    "silent": (is_silent, "S3: no answer in time"),
    "drip": (drips, "S3: no complete answer in time"),
    "hang-up": (hangs_up, "S3: the connection broke"),
    "503": (refuses("503 Slow Down", "SlowDown"), "S3: the store cannot do it now (SlowDown)"),
    "503-page": (
        says("503 No", PAGE, Content_Type="text/html"),
        "S3: the answer is not that of an S3 store (HTTP 503)",
    ),
    "full": (
        refuses("507 Insufficient Storage", "XMinioStorageFull"),
        "S3: the store cannot do it now (XMinioStorageFull)",
    ),
    "full-500": (
        refuses("500 Internal Server Error", "InsufficientStorage"),
        "S3: the store cannot do it now (InsufficientStorage)",
    ),
    "full-without-body": (
        says("507 Insufficient Storage"),
        "S3: the answer is not that of an S3 store (HTTP 507)",
    ),
    "200-page": (says("200 OK", PAGE), "S3: the answer has no ETag"),
    "empty-etag": (says("200 OK", ETag='""'), "S3: the answer has no ETag"),
    "wrong-etag": (says("200 OK", ETag=ETAG), "S3: the ETag is not the MD5 of what was sent"),
    "redirect": (
        says("307 Elsewhere", Location="http://127.0.0.1:9/"),
        "S3: the answer is not that of an S3 store (HTTP 307)",
    ),
    "no-xml": (
        says("500 No", b"<Error", Content_Type="application/xml"),
        "S3: the answer is not that of an S3 store",
    ),
}


@pytest.mark.parametrize("name", FAILS)
async def test_a_failed_attempt_is_reported_and_retried(
    make: Make, proxy: FaultProxy, plain: Minio, seen: Recorder, name: str
) -> None:
    fault, words = FAILS[name]
    # A drip ends with the timeout of one attempt, a silent store with the read timeout.
    times = {"attempt_timeout": 0.5} if fault is drips else {"read_timeout": 0.5}
    artifacts = make(endpoint=proxy.endpoint, **times)
    proxy.faults.append(fault)
    stored = await artifacts.store(TASK, f"failed-{name}", 0, encoded_image())
    assert got(plain, stored.key) == encoded_image().data
    assert (seen.reports[0], seen.reports[-1]) == (words, "")
    async with asyncio.timeout(SOON):
        await (
            proxy.left.get()
        )  # the connection of the failed attempt is closed, and its thread is free


async def test_a_body_that_is_damaged_in_transit_is_sent_again(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, plain: Minio, seen: Recorder
) -> None:
    proxy.faults.append(damages_the_body)
    stored = await behind.store(TASK, "damaged", 0, encoded_image())
    assert got(plain, stored.key) == encoded_image().data
    assert len(seen.reports) == 2
    assert seen.reports[0].startswith("S3: the store did not take it (")


async def test_the_store_verifies_the_checksum(
    artifacts: ObjectStoreArtifacts, seen: Recorder
) -> None:
    wrong = replace(encoded_image(), sha256="00" * 32)
    storing = asyncio.create_task(artifacts.store(TASK, "checksum", 0, wrong))
    codes = ("BadDigest", "XAmzContentSHA256Mismatch")  # SeaweedFS' and MinIO's
    async with asyncio.timeout(SOON):
        reason = await seen.queue.get()
    assert reason in {f"S3: the store did not take it ({code})" for code in codes}
    storing.cancel()
    await asyncio.wait([storing])


async def test_an_etag_that_is_not_an_md5_is_accepted(
    behind: ObjectStoreArtifacts, proxy: FaultProxy
) -> None:
    proxy.faults += [
        says("200 OK", ETag='"a1b2-2"'),
        says("200 OK", ETag=ETAG, x_amz_server_side_encryption="aws:kms"),
    ]
    assert (await behind.store(TASK, "parts", 0, encoded_image())).etag == "a1b2-2"
    assert (await behind.store(TASK, "kms", 0, encoded_image())).etag == ETAG.strip('"')


async def test_reachable_makes_one_attempt(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, seen: Recorder
) -> None:
    proxy.faults.append(refuses("503 Slow Down", "SlowDown"))
    assert await behind.reachable() is False
    assert await behind.reachable() is True
    assert seen.reports == ["S3: the store cannot do it now (SlowDown)", ""]


async def test_the_pauses_grow_and_are_randomized(
    behind: ObjectStoreArtifacts, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return 0.0

    monkeypatch.setattr("consumer.artifacts.object_store.random.uniform", uniform)
    proxy.faults += [refuses("503 Slow Down", "SlowDown")] * 5
    await behind.store(TASK, "pauses", 0, encoded_image())
    assert ranges == [(0, 0.01), (0, 0.02), (0, 0.04), (0, 0.05), (0, 0.05)]


async def test_a_refused_connection_ends_at_the_deadline(make: Make, seen: Recorder) -> None:
    unused = f"http://127.0.0.1:{free_ports(1)[0]}"
    artifacts = make(endpoint=unused, deadline=2)
    async with asyncio.timeout(SOON):
        with pytest.raises(StoreUnavailable) as raised:
            await artifacts.store(TASK, "refused", 0, encoded_image())
    assert type(raised.value) is StoreUnavailable
    assert str(raised.value) == seen.reports[-1]
    assert seen.reports[:2] == ["S3: no connection", "S3: no connection"]


async def test_a_silent_store_ends_at_the_deadline(make: Make, proxy: FaultProxy) -> None:
    proxy.faults += [is_silent] * 100
    artifacts = make(endpoint=proxy.endpoint, read_timeout=600, attempt_timeout=600, deadline=1)
    async with asyncio.timeout(SOON):
        with pytest.raises(StoreUnavailable, match="no complete answer in time"):
            await artifacts.fetch(reference("outputs/x.png"), max_bytes=LIMIT)
        await proxy.left.get()


async def test_the_next_upload_after_an_outage_is_reported_as_recovery(
    tmp_path: Path, seen: Recorder
) -> None:
    with ObjectStore(tmp_path / "store") as store:
        artifacts = ObjectStoreArtifacts(config_for(store, deadline=SOON * 2), observer=seen)
        try:
            await artifacts.ensure_bucket()
            await artifacts.store(TASK, "before", 0, encoded_image())
            store.kill()
            assert await artifacts.reachable() is False
            storing = asyncio.create_task(artifacts.store(TASK, "during", 0, encoded_image()))
            await asyncio.to_thread(store.restart)
            stored = await storing
            assert await artifacts.reachable() is True
            assert got(plain_s3_client(store), stored.key) == encoded_image().data
        finally:
            await artifacts.close()
    assert seen.reports[:2] == ["", ""]
    assert "S3: no connection" in seen.reports[2:-2]
    assert "" not in seen.reports[2:-2]
    assert seen.reports[-2:] == ["", ""]


# -- threads, cancellation and close --------------------------------------------------------------


async def test_cancelled_calls_free_their_threads(
    make: Make, proxy: FaultProxy, plain: Minio, seen: Recorder
) -> None:
    artifacts = make(endpoint=proxy.endpoint, read_timeout=600, attempt_timeout=600, deadline=600)
    proxy.faults += [is_silent] * 8  # as many as there are threads
    stuck = [asyncio.create_task(artifacts.store(TASK, "c", i, encoded_image())) for i in range(12)]
    async with asyncio.timeout(SOON):
        for _ in range(8):
            await proxy.met.get()
        for task in reversed(
            stuck
        ):  # the waiting calls first, or they would take the freed threads
            task.cancel()
        await asyncio.wait(stuck)
        assert all(task.cancelled() for task in stuck)
        for _ in range(8):
            await proxy.left.get()
        stored = await artifacts.store(TASK, "c", 0, encoded_image(9))
    assert got(plain, stored.key) == encoded_image(9).data
    assert proxy.methods == ["PUT"] * 9  # the four waiting calls sent no request
    assert seen.reports == [""]


async def test_the_event_loop_is_not_blocked_while_every_thread_is_busy(
    make: Make, proxy: FaultProxy
) -> None:
    artifacts = make(endpoint=proxy.endpoint, attempt_timeout=0.3, deadline=0.3)
    proxy.faults += [drips] * 100
    async with asyncio.timeout(SOON):  # the proxy runs in this event loop
        ended = await asyncio.gather(
            *(artifacts.store(TASK, "held", i, encoded_image()) for i in range(24)),
            return_exceptions=True,
        )
    assert {str(end) for end in ended} == {"S3: no complete answer in time"}


async def test_close_ends_calls_in_progress(make: Make, proxy: FaultProxy) -> None:
    artifacts = make(endpoint=proxy.endpoint, read_timeout=600, attempt_timeout=600, deadline=600)
    proxy.faults += [drips] * 8  # as many as there are threads: the other calls wait for a thread
    storing = [
        asyncio.create_task(artifacts.store(TASK, "e", i, encoded_image())) for i in range(12)
    ]
    async with asyncio.timeout(SOON):
        for _ in range(8):
            await proxy.met.get()
        await artifacts.close()
        ended = await asyncio.gather(*storing, return_exceptions=True)
        for _ in range(8):
            await proxy.left.get()
    assert {(type(end), str(end)) for end in ended} == {
        (StoreUnavailable, "S3: the client is closed")
    }
    assert proxy.methods == ["PUT"] * 8
    with pytest.raises(StoreUnavailable, match="the client is closed"):
        await artifacts.probe()
    assert not any(thread.name.startswith("artifacts") for thread in await live_threads())


async def live_threads() -> list[threading.Thread]:
    """Join the threads of closed clients; return the remaining threads."""
    for thread in threading.enumerate():
        if thread.name.startswith("artifacts"):
            await asyncio.to_thread(thread.join, SOON)
    return threading.enumerate()


# -- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [fault for fault, _ in FAILS.values()], ids=FAILS)
async def test_errors_and_reports_contain_no_secret_and_no_address(
    make: Make, proxy: FaultProxy, store: ObjectStore, seen: Recorder, fault: Fault
) -> None:
    proxy.faults += [fault] * 100
    times = {"read_timeout": 0.1, "attempt_timeout": 0.1, "deadline": 0.1}
    artifacts = make(endpoint=proxy.endpoint, **times)
    with pytest.raises(StoreUnavailable) as raised:
        await artifacts.store(TASK, "secret", 0, encoded_image())
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    for text in (shown.replace(__file__, ""), *seen.reports):
        for secret in (store.secret_key, store.access_key, "X-Amz", "Signature", proxy.endpoint):
            assert secret not in text
    assert raised.value.__context__ is None  # no exception of a library is chained


# -- discarded outputs ----------------------------------------------------------------------------


async def test_two_runs_of_one_request_store_separate_objects(
    artifacts: ObjectStoreArtifacts, plain: Minio
) -> None:
    first, second = encoded_image(120), encoded_image(121)
    kept, discarded = [await artifacts.store(TASK, "race", 0, image) for image in (first, second)]
    assert kept.key != discarded.key
    await artifacts.discard(discarded)
    assert got(plain, kept.key) == first.data
    remaining = plain.list_objects(bucket_name=BUCKET, prefix=f"{PREFIX}/{TASK}/race/")
    assert [found.object_name for found in remaining] == [kept.key]


async def test_discard_never_raises_and_reports_nothing(
    make: Make, store: StoreWithScopedUser | MinioServer, seen: Recorder
) -> None:
    scoped = make(access_key=store.scoped_access_key, secret_key=store.scoped_secret_key)
    stored = await scoped.store(TASK, "discarded", 0, encoded_image())
    reports = list(seen.reports)
    await scoped.discard(stored.model_copy(update={"key": "elsewhere/0.png"}))  # access is denied
    for _ in range(2):  # the second call finds no object
        await scoped.discard(stored)
    assert seen.reports == reports
