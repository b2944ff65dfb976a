"""`consumer run` as a child process: the very command that an installation runs."""

import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from consumer.devstack.loopback import HOST, free_ports, http_status
from consumer.devstack.process import ChildProcess, inherited_environment, secrets_in


class Daemon(ChildProcess):
    """One `consumer run`.

    Args:
        name: what people call it, in messages.
        settings: its environment settings. They come on top of this process's environment, from
            which the settings of NATS, S3 and gateways are left out: those are of others.
        log: file that its output is appended to.
        probes_port: where it serves /livez, /readyz and /metrics; None chooses a free port.

    Ready when `/readyz` answers 200, that is, with its model loaded; SIGTERM drains it.
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
        """Where it serves /livez, /readyz and /metrics."""
        return f"http://{HOST}:{self.ports['probes']}"

    def _is_ready(self) -> bool:
        return http_status(self.ports["probes"], "/readyz") == HTTPStatus.OK
