"""SeaweedFS as a child process on loopback: the S3 server of the development stack.

`weed mini` runs all of SeaweedFS in one process and is ready in 0.5 to 0.8 s; `weed server` takes
12 s. Its option `-bucket` creates the bucket some 0.7 s after it is ready and does not report it.
So `consumer apply` creates buckets through S3, in 10 ms.
"""

import contextlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from consumer.devstack.loopback import HOST, FreePorts, http_status
from consumer.devstack.process import ChildProcess, find_program, server_environment

_PRIVATE_FILE = 0o600
_IDENTITIES = "s3.json"
_GRPC_PARTS = ("admin", "filer", "master", "s3", "volume")
_SOCKET_FOLDER = "/tmp"  # noqa: S108 - not a choice made here: weed puts them there

# The arguments of `weed mini` except the ports. Paths are relative to the working directory:
# -dir splits at commas, and the path of a Unix socket may have only 107 bytes.
_FLAGS = (
    "-dir=data",
    f"-ip={HOST}",
    f"-ip.bind={HOST}",  # without both it listens on all addresses
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-admin.ui=false",
    "-webdav=false",
    "-disableHttp",  # the filer's HTTP server returns every object without credentials
    "-master.telemetry=false",
    "-s3.autoCreateBucket=false",
    f"-s3.config={_IDENTITIES}",  # without it, every client may write
    "-s3.localSocket=s3.sock",
    "-filer.localSocket=filer.sock",
    "-volume.preStopSeconds=0",  # stops in 1.3 s instead of 2.3: there is no cluster to warn
    "-s3.concurrentUploadLimitMB=32",
    "-filer.concurrentUploadLimitMB=32",
    "-volume.concurrentUploadLimitMB=32",
)
# weed's maintenance worker expects the admin server's gRPC port here, regardless of
# -admin.port.grpc, and would connect to another program's port every few seconds.
_ADMIN_GRPC_DISTANCE = 10_000
# A target of Go's garbage collector, not a limit. It counts more than resident memory (150 to 200
# MB). Below 320 MiB the collector runs all the time, and storing an object of 1.8 MB takes 64 ms
# of CPU instead of 16.
_MEMORY = "512MiB"


@dataclass(frozen=True)
class Credentials:
    """One S3 identity; random unless given."""

    access_key: str = field(default_factory=lambda: secrets.token_hex(10))
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)


class ObjectStore(ChildProcess):
    """One SeaweedFS; its objects are stored in `directory` and survive restarts.

    Args:
        directory: contains credentials and objects; created with mode 0700.
        ports: all ten, by the name of weed's flag; None chooses free ones. The ports of a directory
            must not change: the master's state is in a folder named after its port.
        credentials: of the only identity, which has all permissions; None creates random ones.
        bucket: the value of `S3_BUCKET`; the bucket is not created here.
        log: log file; None means `store.log` in `directory`.

    Ready when `/healthz` of the S3 port returns 200.
    """

    port_names = tuple(
        f"{part}.port{kind}"
        for part in ("master", "volume", "filer", "s3", "admin")
        for kind in ("", ".grpc")
    )
    port_taken_text = "is not available"

    def __init__(
        self,
        directory: Path,
        *,
        ports: Mapping[str, int] | None = None,
        credentials: Credentials | None = None,
        bucket: str = "generation",
        log: Path | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.bucket = bucket
        self.credentials = credentials or Credentials()
        chosen = ports or self.choose_ports()
        port_flags = [f"-{name}={port}" for name, port in chosen.items()]
        super().__init__(
            "weed",
            # Without -logtostderr it logs to the temporary folder.
            [find_program("weed"), "-logtostderr=true", "mini", *_FLAGS, *port_flags],
            log=log or self.directory / "store.log",
            env=server_environment(self.directory, GOMEMLIMIT=_MEMORY),
            cwd=self.directory,
            ports=chosen,
            secrets=[self.credentials.secret_key],
            umask=0o077,
            grace=5.0,  # it takes 1.3 s; killed right after a 200, it lost 0 of 24 objects
        )

    @classmethod
    def choose_ports(cls, free: FreePorts | None = None) -> dict[str, int]:
        """Choose the server's ports, different from all other ports of `free`."""
        with contextlib.nullcontext(free) if free else FreePorts() as choice:
            ports = {name: choice.take() for name in cls.port_names}
            ports["admin.port"], ports["admin.port.grpc"] = choice.take_pair(_ADMIN_GRPC_DISTANCE)
            return ports

    @property
    def endpoint(self) -> str:
        """The URL of the S3 API."""
        return f"http://{HOST}:{self.ports['s3.port']}"

    @property
    def access_key(self) -> str:
        """The access key of the one identity."""
        return self.credentials.access_key

    @property
    def secret_key(self) -> str:
        """The secret key of the one identity."""
        return self.credentials.secret_key

    def _prepare(self) -> None:
        self._after_exit()  # a killed parent could not remove the files
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.directory / "data").mkdir(mode=0o700, exist_ok=True)
        identities = self.directory / _IDENTITIES
        identities.touch(_PRIVATE_FILE)  # before the secret is in it
        key = {"accessKey": self.access_key, "secretKey": self.secret_key}
        identity = {"name": "devstack", "credentials": [key], "actions": ["Admin"]}
        identities.write_text(json.dumps({"identities": [identity]}))

    def _is_ready(self) -> bool:
        if http_status(self.ports["s3.port"], "/healthz") != HTTPStatus.OK:
            return False
        if self.port_taken_text in self.log_since_start():
            # weed ends if an HTTP port is in use, but replaces a gRPC port by another one.
            raise self._start_failed("did not get its ports")
        return True

    def _after_exit(self) -> None:
        # weed fixes these names. It removes the files only when it stops without being killed, and
        # never removes the socket of the S3 gateway.
        for part in _GRPC_PARTS:
            name = f"seaweedfs-{part}-grpc-{self.ports[f'{part}.port.grpc']}.sock"
            Path(_SOCKET_FOLDER, name).unlink(missing_ok=True)
        (self.directory / "s3.sock").unlink(missing_ok=True)
        (self.directory / "filer.sock").unlink(missing_ok=True)
