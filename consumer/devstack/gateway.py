"""`consumer gateway` as a child process: the very command that an installation runs."""

import os
import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from consumer.devstack.loopback import HOST, free_ports, http_status
from consumer.devstack.process import ChildProcess

# Settings with these prefixes are for other servers, or for a gateway that others reach.
_NOT_INHERITED = ("NATS_", "S3_", "GATEWAY_")


class GatewayServer(ChildProcess):
    """One `consumer gateway`.

    Args:
        name: what people call it, in messages.
        settings: its environment settings. They come on top of this process's environment, from
            which the settings of NATS, S3 and gateways are left out.
        log: file that its output is appended to.
        port: where it listens on loopback; None chooses a free port.

    Ready when `/readyz` answers 200; SIGTERM drains it.
    """

    def __init__(
        self, name: str, settings: Mapping[str, str], *, log: Path, port: int | None = None
    ) -> None:
        port = free_ports(1)[0] if port is None else port
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)
        }
        super().__init__(
            name,
            # -P: a folder named consumer in the working directory is not this package.
            [sys.executable, "-P", "-m", "consumer", "gateway"],
            log=log,
            env={"GATEWAY_HOST": HOST, **inherited, **settings, "GATEWAY_PORT": str(port)},
            ports={"http": port},
            secrets=[settings["S3_SECRET_KEY"]] if settings.get("S3_SECRET_KEY") else [],
            grace=40.0,  # the default GATEWAY_DRAIN_GRACE of 30 s, and its clean-up
        )

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.ports['http']}"

    def _is_ready(self) -> bool:
        return http_status(self.ports["http"], "/readyz") == HTTPStatus.OK
