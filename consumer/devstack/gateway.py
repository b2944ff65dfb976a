"""`consumer gateway` as a child process."""

import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from consumer.devstack.loopback import HOST, free_ports, http_status
from consumer.devstack.process import ChildProcess, inherited_environment, secrets_in


class GatewayServer(ChildProcess):
    """One `consumer gateway`.

    Args:
        name: name of the child in messages.
        settings: environment settings of the gateway. They are added to this process's environment,
            without its settings of NATS, S3 and gateways.
        log: file to which the output is appended.
        port: port on loopback; None chooses a free port.

    Ready when `/readyz` returns 200; SIGTERM drains the gateway.
    """

    def __init__(
        self, name: str, settings: Mapping[str, str], *, log: Path, port: int | None = None
    ) -> None:
        port = free_ports(1)[0] if port is None else port
        super().__init__(
            name,
            # -P: a folder named consumer in the working directory is not this package.
            [sys.executable, "-P", "-m", "consumer", "gateway"],
            log=log,
            env={
                **inherited_environment(),
                "GATEWAY_HOST": HOST,
                **settings,
                "GATEWAY_PORT": str(port),
            },
            ports={"http": port},
            secrets=secrets_in(settings),
            grace=40.0,  # the default GATEWAY_DRAIN_GRACE of 30 s, and its clean-up
        )

    @property
    def url(self) -> str:
        """The base URL of the gateway."""
        return f"http://{HOST}:{self.ports['http']}"

    def _is_ready(self) -> bool:
        return http_status(self.ports["http"], "/readyz") == HTTPStatus.OK
