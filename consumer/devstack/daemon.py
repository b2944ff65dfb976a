"""`consumer run` as a child process."""

import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from consumer.devstack.loopback import HOST, free_ports, http_status
from consumer.devstack.process import ChildProcess, inherited_environment, secrets_in


class Daemon(ChildProcess):
    """One `consumer run`.

    Args:
        name: name of the child in messages.
        settings: environment settings of the daemon. They are added to this process's environment,
            without its settings of NATS, S3 and gateways, which may name other servers.
        log: file to which the output is appended.
        probes_port: port of /livez, /readyz and /metrics; None chooses a free port.

    Ready when `/readyz` returns 200, with the model loaded; SIGTERM drains the daemon.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, str],
        *,
        log: Path,
        probes_port: int | None = None,
    ) -> None:
        port = free_ports(1)[0] if probes_port is None else probes_port
        super().__init__(
            name,
            # -P: a folder named consumer in the working directory is not this package.
            [sys.executable, "-P", "-m", "consumer", "run"],
            log=log,
            env={**inherited_environment(), **settings, "CONSUMER_PROBES_PORT": str(port)},
            ports={"probes": port},
            secrets=secrets_in(settings),
            grace=40.0,  # the default CONSUMER_DRAIN_GRACE of 30 s, and its clean-up
            ready_timeout=300.0,  # a large model takes minutes to load
        )

    @property
    def probes_url(self) -> str:
        """The base URL of /livez, /readyz and /metrics."""
        return f"http://{HOST}:{self.ports['probes']}"

    def _is_ready(self) -> bool:
        return http_status(self.ports["probes"], "/readyz") == HTTPStatus.OK
