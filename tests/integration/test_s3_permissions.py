"""The permissions of the worker in S3, from the files in infra/s3, on SeaweedFS and MinIO."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2
import pytest
from minio import Minio
from minio.error import S3Error
from PIL import Image

from consumer.app.probes import NullObserver
from consumer.artifacts import ObjectStoreArtifacts, store_config
from consumer.devstack import ChildProcess, ObjectStore, free_ports
from consumer.devstack.loopback import HOST, http_status
from consumer.devstack.object_store import Credentials
from consumer.devstack.process import find_program, server_environment
from consumer.media.codec import ImageCodec
from consumer.settings import Settings
from generation_contracts import ArtifactReference, Task, UploadRequest
from tests.integration import minio_server
from tests.integration.minio_server import MinioServer
from tests.support.scene import ROOT

IDENTITIES = ROOT / "infra" / "s3" / "identities.json"
POLICY = ROOT / "infra" / "s3" / "policy.json"
BUCKET = "generation"


class Users:
    """A store with the users `admin` and `worker`.

    Attributes:
        endpoint: The URL of the S3 API.
        keys: The key pairs of `admin` and `worker`.
    """

    endpoint: str
    keys: dict[str, Credentials]

    def client(self, name: str) -> Minio:
        """Return a client of the SDK with the key pair of a user."""
        key = self.keys[name]
        return Minio(
            self.endpoint.removeprefix("http://"),
            access_key=key.access_key,
            secret_key=key.secret_key,
            secure=False,
            region="us-east-1",
        )

    def artifacts(self, name: str) -> ObjectStoreArtifacts:
        """Return the daemon's adapter of the store with the key pair of a user."""
        key = self.keys[name]
        settings = Settings(
            s3_endpoint=self.endpoint,
            s3_access_key=key.access_key,
            s3_secret_key=key.secret_key,  # type: ignore[arg-type] # pydantic converts the string
            s3_bucket=BUCKET,
        )
        return ObjectStoreArtifacts(store_config(settings), observer=NullObserver())

    def make_worker(self) -> None:
        """Create the worker with the program that compose runs for MinIO."""
        secrets = self.directory / "secrets"
        secrets.mkdir()
        for name, key in self.keys.items():
            (secrets / f"{name}_settings").write_text(
                f's3_access_key = "{key.access_key}"\ns3_secret_key = "{key.secret_key}"\n'
            )
        for _ in range(2):  # a second run is allowed
            subprocess.run(
                [sys.executable, str(ROOT / "infra" / "compose" / "minio_worker.py")],
                env={
                    **os.environ,
                    "S3_ENDPOINT": self.endpoint,
                    "SECRETS": str(secrets),
                    "POLICY_FILE": str(POLICY),
                },
                check=True,
                capture_output=True,
            )


class SeaweedWithUsers(ObjectStore, Users):  # type: ignore[misc] # its endpoint is a property
    """SeaweedFS with the identities of infra/s3."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, bucket=BUCKET)
        self.keys = {}

    def _prepare(self) -> None:
        super()._prepare()
        identities: dict[str, Any] = json.loads(IDENTITIES.read_text())
        for identity in identities["identities"]:
            key = self.keys[identity["name"]] = Credentials()
            identity["credentials"] = [{"accessKey": key.access_key, "secretKey": key.secret_key}]
        (self.directory / "s3.json").write_text(json.dumps(identities))

    def make_worker(self) -> None:
        """Do nothing: the identities file defines the worker."""


class MinioWithUsers(ChildProcess, Users):
    """MinIO's S3 front end in the gateway of JuiceFS, with users as compose creates them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ports = dict(zip(("s3", "metrics"), free_ports(2), strict=True))
        self.endpoint = f"http://{HOST}:{ports['s3']}"
        self.keys = {name: Credentials() for name in ("admin", "worker")}
        meta = f"sqlite3://{directory}/meta.db"
        admin = self.keys["admin"]
        super().__init__(
            "juicefs",
            [
                find_program("juicefs"),
                *("--no-agent", "gateway", meta, f"{HOST}:{ports['s3']}", "--multi-buckets"),
                *("--keep-etag", "--object-tag", "--object-meta", "--no-usage-report"),
                *("--no-banner", "--backup-meta", "0", "--metrics", f"{HOST}:{ports['metrics']}"),
                *("--log", str(directory / "gateway.log"), "--cache-dir", str(directory / "cache")),
                *("--cache-size", "100M", "--buffer-size", "64M"),
            ],
            log=directory / "juicefs.log",
            env=server_environment(
                directory, MINIO_ROOT_USER=admin.access_key, MINIO_ROOT_PASSWORD=admin.secret_key
            ),
            ports=ports,
        )
        self._meta = meta

    def _prepare(self) -> None:
        subprocess.run(
            [
                find_program("juicefs"),
                *("--no-agent", "format", self._meta, "volume", "--storage", "file"),
                *("--bucket", f"{self.directory}/blobs/", "--trash-days", "0"),
            ],
            check=True,
            capture_output=True,
        )

    def _is_ready(self) -> bool:
        return http_status(self.ports["s3"], "/minio/health/ready") == HTTPStatus.OK


class RealMinioWithUsers(MinioServer, Users):
    """A real MinIO server, with users as compose creates them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        super().__init__(directory)
        root = Credentials(self.access_key, self.secret_key)
        self.keys = {"admin": root, "worker": Credentials()}


STORES: dict[str, type] = {
    "SeaweedFS": SeaweedWithUsers,
    "MinIO's front end": MinioWithUsers,
    **({"MinIO": RealMinioWithUsers} if minio_server.is_installed() else {}),
}


@pytest.fixture(scope="module", params=STORES, ids=str)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Users]:
    running = STORES[request.param](tmp_path_factory.mktemp("store"))
    try:
        running.start()
        running.wait_ready()
        running.make_worker()
        for bucket in (BUCKET, "private"):
            running.client("admin").make_bucket(bucket)
        yield running
    finally:
        running.kill()


async def test_the_worker_can_do_its_work(store: Users) -> None:
    artifacts = store.artifacts("worker")
    try:
        assert not await artifacts.ensure_bucket()
        await artifacts.probe()
        assert await artifacts.reachable()
        image = ImageCodec().encode(Image.new("RGB", (8, 8)), "png", seed=1)
        stored = await artifacts.store(Task.TEXT_TO_IMAGE, "r1", 0, image)
        reference = ArtifactReference(bucket=stored.bucket, key=stored.key)
        assert await artifacts.fetch(reference, max_bytes=10_000) == image.data
        await artifacts.discard(stored)
    finally:
        await artifacts.close()
    with pytest.raises(S3Error, match="NoSuchKey"):
        store.client("admin").stat_object(BUCKET, stored.key)


async def test_a_sender_can_upload_with_a_form_of_the_worker(store: Users) -> None:
    artifacts = store.artifacts("worker")
    try:
        form = artifacts.sign_upload(UploadRequest(size=3, media_type="image/png"))
        answer = httpx2.post(form.url, data=form.fields, files={"file": ("x", b"abc")})
        assert answer.status_code in {200, 204}
        reference = ArtifactReference(bucket=form.bucket, key=form.key)
        assert await artifacts.fetch(reference, max_bytes=10) == b"abc"
    finally:
        await artifacts.close()


FORBIDDEN = {
    "read objects of another bucket": lambda client: client.get_object("private", "x"),
    "write objects of another bucket": lambda client: client.fput_object(
        "private", "x", str(POLICY)
    ),
    "delete objects of another bucket": lambda client: client.remove_object("private", "x"),
    "create a bucket": lambda client: client.make_bucket("mine"),
    "delete its bucket": lambda client: client.remove_bucket(BUCKET),
    "change the policy of its bucket": lambda client: client.set_bucket_policy(
        BUCKET, POLICY.read_text()
    ),
    "list the objects of its bucket": lambda client: list(client.list_objects(BUCKET)),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_worker_is_denied_access(store: Users, what: str) -> None:
    with pytest.raises(S3Error) as error:
        FORBIDDEN[what](store.client("worker"))
    assert error.value.code == "AccessDenied"


def test_the_policy_for_other_stores_has_the_same_permissions() -> None:
    (statement,) = json.loads(POLICY.read_text())["Statement"]
    assert statement["Effect"] == "Allow"
    assert statement["Resource"] == [f"arn:aws:s3:::{BUCKET}/*"]
    assert set(statement["Action"]) == {
        "s3:PutObject",
        "s3:GetObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
    }
