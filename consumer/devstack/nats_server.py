"""nats-server with JetStream as a child process on loopback."""

import contextlib
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from consumer.devstack.loopback import HOST, FreePorts, http_status
from consumer.devstack.process import ChildProcess, find_program, server_environment

_CONFIG = "nats.conf"
_PRIVATE_FILE = 0o600
# What all streams together may reserve; a reservation takes no space on the disk. The default is
# 75% of the free space of the disk, which is less than the streams of `consumer apply` reserve
# (7.4 GiB) where the folder is on a small disk or in memory, and for a second subject root.
_MAX_FILE_STORE = "1TB"


class NatsServer(ChildProcess):
    """One nats-server; its streams are stored in `directory` and survive restarts.

    Args:
        directory: contains configuration and streams; created with mode 0700.
        ports: `client` and `monitoring`; None chooses free ones.
        config: more configuration, appended unchanged to the server's file (users, limits, TLS).
        log: log file; None means `nats.log` in `directory`.

    Ready when `/healthz` of the monitoring port returns 200, after JetStream's recovery.
    """

    port_names = ("client", "monitoring")

    def __init__(
        self,
        directory: Path,
        *,
        ports: Mapping[str, int] | None = None,
        config: str = "",
        log: Path | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self._config = config
        super().__init__(
            "nats-server",
            [find_program("nats-server"), "-c", _CONFIG],
            log=log or self.directory / "nats.log",
            env=server_environment(self.directory),
            cwd=self.directory,
            ports=ports or self.choose_ports(),
            umask=0o077,
        )

    @classmethod
    def choose_ports(cls, free: FreePorts | None = None) -> dict[str, int]:
        """Choose the server's ports, different from all other ports of `free`."""
        with contextlib.nullcontext(free) if free else FreePorts() as choice:
            return {name: choice.take() for name in cls.port_names}

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"nats://{HOST}:{self.ports['client']}"

    @property
    def monitoring_url(self) -> str:
        """The base URL of the monitoring endpoints: /varz, /jsz, /connz, /healthz."""
        return f"http://{HOST}:{self.ports['monitoring']}"

    def _prepare(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.directory / _CONFIG
        path.touch(_PRIVATE_FILE)  # before it is written: the appended text may hold passwords
        client, monitoring = (self.ports[name] for name in self.port_names)
        path.write_text(
            f'listen: "{HOST}:{client}"\n'
            f'http: "{HOST}:{monitoring}"\n'
            # store_dir is relative to the working directory.
            f'jetstream {{ store_dir: "jetstream", max_file_store: {_MAX_FILE_STORE} }}\n'
            f"{self._config}\n"
        )

    def _is_ready(self) -> bool:
        return http_status(self.ports["monitoring"], "/healthz") == HTTPStatus.OK
