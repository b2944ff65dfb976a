"""A real MinIO server, if `minio` is on the PATH; `.ci/run` builds it if Go is installed."""

import os
import shutil
from http import HTTPStatus
from pathlib import Path

from minio import MinioAdmin
from minio.credentials import StaticProvider

from consumer.devstack import ChildProcess, free_ports
from consumer.devstack.loopback import HOST, http_status
from consumer.devstack.object_store import Credentials
from consumer.devstack.process import server_environment

REQUIRED = "MINIO_REQUIRED"  # environment variable: if set, a missing minio is an error


def is_installed() -> bool:
    """Whether the tests of stores also run on MinIO."""
    found = shutil.which("minio") is not None
    assert found or REQUIRED not in os.environ, "minio is not on the PATH"
    return found


class MinioServer(ChildProcess):
    """One server with its root user, and a second key pair that is limited to one prefix.

    Attributes:
        endpoint: The URL of the S3 API.
        access_key: The access key of the root user.
        secret_key: The secret key of the root user.
    """

    scoped_access_key = "worker"
    scoped_secret_key = "the-secret-of-the-worker"

    def __init__(self, directory: Path) -> None:
        program = shutil.which("minio")
        assert program is not None
        ports = dict(zip(("s3.port", "console"), free_ports(2), strict=True))
        self.endpoint = f"http://{HOST}:{ports['s3.port']}"
        root = Credentials()
        self.access_key, self.secret_key = root.access_key, root.secret_key
        super().__init__(
            "minio",
            [
                program,
                *("server", str(directory / "data"), "--address", f"{HOST}:{ports['s3.port']}"),
                *("--console-address", f"{HOST}:{ports['console']}"),
            ],
            log=directory / "minio.log",
            env=server_environment(
                directory,
                MINIO_ROOT_USER=self.access_key,
                MINIO_ROOT_PASSWORD=self.secret_key,
                MINIO_BROWSER="off",
                MINIO_UPDATE="off",
            ),
            cwd=directory,
            ports=ports,
        )

    def _is_ready(self) -> bool:
        return http_status(self.ports["s3.port"], "/minio/health/cluster") == HTTPStatus.OK

    def admin(self) -> MinioAdmin:
        """Return a client of the admin API."""
        keys = StaticProvider(self.access_key, self.secret_key)
        host = self.endpoint.removeprefix("http://")
        return MinioAdmin(endpoint=host, credentials=keys, secure=False)

    def add_scoped_user(self, objects: str) -> None:
        """Create the second key pair, for the objects `bucket/prefix/*`."""
        actions = ["s3:PutObject", "s3:GetObject", "s3:DeleteObject"]
        resources = [f"arn:aws:s3:::{objects}"]
        statement = {"Effect": "Allow", "Action": actions, "Resource": resources}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        admin = self.admin()
        admin.user_add(self.scoped_access_key, self.scoped_secret_key)
        admin.policy_add("scoped", policy=policy)
        admin.policy_set("scoped", user=self.scoped_access_key)
