"""Three nats-servers as one cluster on loopback, with the S3 server beside them."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from consumer.apply import apply
from consumer.devstack import NatsServer, ObjectStore, free_ports
from consumer.devstack.loopback import HOST
from consumer.settings import Settings
from tests.support.scene import Scene

NODES = 3


class Cluster:
    """What a `Scene` needs of a stack, with three servers where that has one.

    Attributes:
        nodes: The servers, by their names.
        store: The S3 server.
    """

    def __init__(self, nodes: dict[str, NatsServer], store: ObjectStore) -> None:
        self.nodes = nodes
        self.store = store

    @property
    def nats(self) -> NatsServer:
        """One of the servers; a client learns of the others from it."""
        return next(iter(self.nodes.values()))

    def environment(self) -> dict[str, str]:
        """The settings of a worker that knows them all."""
        return {
            "NATS_URL": ",".join(node.url for node in self.nodes.values()),
            "S3_ENDPOINT": self.store.endpoint,
            "S3_ACCESS_KEY": self.store.access_key,
            "S3_SECRET_KEY": self.store.secret_key,
            "S3_BUCKET": self.store.bucket,
        }

    def meta_leader(self) -> str:
        """The server that decides where streams are, as one that lives sees it; "" while none is.

        A server says so on its monitoring port.
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
    """An installation whose streams are on every server."""

    async def apply(self, **settings: str) -> None:
        """`consumer apply` with three copies of each stream."""
        values: dict[str, Any] = {**self.settings(), "NATS_REPLICAS": str(NODES), **settings}
        await apply(Settings(**{name.lower(): value for name, value in values.items()}))

    async def leader(self, stream: str) -> str:
        """The server that leads a stream."""
        info = await self.sender.jetstream().stream_info(stream)
        assert info.cluster is not None
        return str(info.cluster.leader)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start everything; return when the cluster has a leader."""
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
