"""A cluster of three nats-servers on loopback, and an S3 server."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from consumer.app.apply import apply
from consumer.devstack import NatsServer, ObjectStore, free_ports
from consumer.devstack.loopback import HOST
from consumer.settings import Settings
from tests.support.scene import Scene

NODES = 3


class Cluster:
    """Replaces the `DevStack` of a `Scene`, with three NATS servers.

    Attributes:
        nodes: The servers, by their names.
        store: The S3 server.
    """

    def __init__(self, nodes: dict[str, NatsServer], store: ObjectStore) -> None:
        self.nodes = nodes
        self.store = store

    @property
    def nats(self) -> NatsServer:
        """One of the servers. A client discovers the other servers from it."""
        return next(iter(self.nodes.values()))

    def environment(self) -> dict[str, str]:
        """Return the settings of a worker with the URLs of all servers."""
        return {
            "NATS_URL": ",".join(node.url for node in self.nodes.values()),
            "S3_ENDPOINT": self.store.endpoint,
            "S3_ACCESS_KEY": self.store.access_key,
            "S3_SECRET_KEY": self.store.secret_key,
            "S3_BUCKET": self.store.bucket,
        }

    def meta_leader(self) -> str:
        """Return the name of the meta leader, or "" without one.

        A running server reports the name on its monitoring port.
        """
        for node in self.nodes.values():
            with contextlib.suppress(OSError):
                url = f"{node.monitoring_url}/jsz"
                with urllib.request.urlopen(url, timeout=1) as answer:  # noqa: S310 - loopback
                    leader = json.load(answer).get("meta_cluster", {}).get("leader", "")
                if leader and self.nodes[leader].alive:
                    return str(leader)
        return ""


class ClusterScene(Scene):
    """An installation with a replica of every stream on every server."""

    async def apply(self, **settings: str) -> None:
        """Run `consumer apply` with three replicas of each stream."""
        values: dict[str, Any] = {**self.settings(), "NATS_REPLICAS": str(NODES), **settings}
        await apply(Settings(**{name.lower(): value for name, value in values.items()}))

    async def leader(self, stream: str) -> str:
        """Return the name of the leader of a stream."""
        info = await self.sender.jetstream().stream_info(stream)
        assert info.cluster is not None
        return str(info.cluster.leader)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start all servers, and wait until the cluster has a leader."""
    names = [f"n{number}" for number in range(1, NODES + 1)]
    ports = dict(zip(names, free_ports(NODES), strict=True))
    routes = [f"nats://{HOST}:{port}" for port in ports.values()]
    with ExitStack() as running:
        nodes = {
            name: NatsServer(
                folder / name,
                config=(
                    f"server_name: {name}\n"
                    f'cluster {{ name: test, listen: "{HOST}:{port}"\n'
                    f"routes: {json.dumps(routes)} }}"
                ),
            )
            for name, port in ports.items()
        }
        store = ObjectStore(folder / "store")
        for process in (*nodes.values(), store):
            running.callback(process.kill)
            process.start()
        for process in (*nodes.values(), store):
            process.wait_ready()
        yield Cluster(nodes, store)
