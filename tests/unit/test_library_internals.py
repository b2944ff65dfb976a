"""The private members of nats-py, minio and urllib3 that the daemon uses, by module.

Each digest is of the source of a function. If a digest differs after an update, read the change,
adapt the module that the table names, and then write the new digest.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minio
import pytest
from minio import Minio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.micro.request import Request
from nats.micro.service import Endpoint, EndpointConfig, Service, ServiceConfig
from nats.protocol.parser import Parser
from urllib3 import PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

import consumer
import generation_client
from consumer.artifacts.calls import connection_pools, pinned_pool
from consumer.bus.endpoint_connection import EndpointClient
from consumer.bus.nats_internals import RobustClient, reply_subject

PACKAGES = [Path(package.__path__[0]) for package in (consumer, generation_client)]
LIBRARIES = {"nats", "minio", "urllib3"}

DIGESTS: dict[Callable[..., Any], str] = {
    # consumer/bus/nats_internals.py, nats-py 2.16.0
    Parser.parse: "7d6165f1766c",
    Parser.reset: "0f304f3f8691",
    Client._attempt_reconnect: "2bbc96e0f2f7",
    Client._build_message: "13cbe7b7f8cb",
    Client._close: "9a92d3aca1b2",
    Client._connect_command: "1999c01f55c9",
    Client._flush_pending: "317c8d7ef54b",
    Client._flusher: "43957ffb357d",
    Client._process_err: "ceb70f44e38f",
    Client._process_headers: "fe656f61147d",
    Client._process_info: "ecca7bb93130",
    Client._process_msg: "6cff75947e97",
    Client._process_op_err: "d4257cb1203c",
    Client._process_ping: "7dfc2df74827",
    Client._process_pong: "ee4c4d01a16d",
    Client._read_creds_user_jwt: "2050d5fbdf85",
    Client._read_creds_user_nkey: "9869ec654a05",
    Client._read_loop: "b44b9401f436",
    Client._select_next_server: "c278559f8a14",
    Client._send_command: "ed57e8e86389",
    Client.connect: "a333807745c3",
    Client.flush: "b410d7515bcc",
    Client.force_reconnect: "c2a2e91c5600",
    Endpoint._start: "c59e0a345763",
    Service.stop: "e4315a631aea",
    # consumer/artifacts/minio_internals.py, minio 7.2
    Minio._build_headers: "5e8436e9644f",
    Minio._url_open: "7d27df8d9e83",
}


@pytest.mark.parametrize("function", DIGESTS, ids=lambda function: function.__qualname__)
def test_patched_library_function_is_unchanged(function: Callable[..., Any]) -> None:
    source = inspect.getsource(function)
    assert hashlib.sha256(source.encode()).hexdigest()[:12] == DIGESTS[function]


# -- private attributes ---------------------------------------------------------------------------


def test_nats_py_has_the_private_attributes() -> None:
    plain, robust = Client(), RobustClient()
    assert isinstance(plain._ps, Parser)
    assert plain._pongs == []
    assert plain._status == Client.DISCONNECTED
    assert not robust.is_clustered
    # As `Client._process_info` does.
    plain._server_info = robust._server_info = {"cluster": "three"}
    assert robust.is_clustered

    service = Service(robust, ServiceConfig(name="a", version="1.0.0"))
    assert service._endpoints == []
    endpoint = Endpoint(service, EndpointConfig(name="a", handler=_ignore))
    assert endpoint._subscription is None
    assert reply_subject(Request(Msg(robust, "a", reply="inbox"))) == "inbox"


async def _ignore(_: Request) -> None: ...


def test_minio_has_the_private_attributes() -> None:
    assert [Minio("host", secure=tls)._base_url.is_https for tls in (False, True)] == [False, True]
    assert {"sha256_hash", "md5sum_hash"} <= vars(minio.api).keys()


@pytest.mark.parametrize(
    ("scheme", "pool_class", "connection_class"),
    [
        ("http", HTTPConnectionPool, HTTPConnection),
        ("https", HTTPSConnectionPool, HTTPSConnection),
    ],
)
def test_urllib3_pools_make_connections_of_the_daemon(
    scheme: str, pool_class: type, connection_class: type
) -> None:
    pools = connection_pools(connect_timeout=1, read_timeout=1)
    for pool in (
        pools.connection_from_url(f"{scheme}://host"),
        *([pinned_pool("192.0.2.1", 443, host="host")] if scheme == "https" else []),
    ):
        connection = pool._new_conn()
        assert isinstance(pool, pool_class)
        assert isinstance(connection, connection_class)
        assert type(connection).__module__ == "consumer.artifacts.calls"
        assert connection.sock is None
    assert type(PoolManager().connection_from_url(f"{scheme}://host")) is pool_class


# -- modules with private names -------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_used(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of other objects, in a module that imports one of the libraries."""
    imported: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported |= {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                imported.add(module.partition(".")[0])
                used |= {alias.name for alias in names if module.partition(".")[0] in LIBRARIES}
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "os")):
                pass
            case ast.Attribute(attr=name):
                used.add(name)
    if imported & LIBRARIES:
        yield from filter(is_private, used)


def test_one_module_uses_the_private_names_of_each_library() -> None:
    users = {
        file.name: set(private_names_used(ast.parse(file.read_text())))
        for package in PACKAGES
        for file in package.rglob("*.py")
    }
    assert {"_endpoints", "_msg"} <= users.pop("nats_internals.py")
    assert users.pop("minio_internals.py") == {"_build_headers"}
    assert {name: names for name, names in users.items() if names} == {}


def names_bound_by(kind: type) -> set[str]:
    """Return the names of all methods and attributes of a class, including set attributes."""
    source = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    return {
        node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    }


def connection_class_of(url: str) -> type:
    pools = connection_pools(connect_timeout=1, read_timeout=1)
    return type(pools.connection_from_url(url)._new_conn())


@pytest.mark.parametrize(
    "kind",
    [EndpointClient, connection_class_of("http://host"), connection_class_of("https://host")],
    ids=lambda kind: kind.__name__,
)
def test_other_subclasses_override_no_private_name_of_the_library(kind: type) -> None:
    ours = {each for each in kind.__mro__ if each.__module__.startswith("consumer.")}
    subclasses = ours - {RobustClient}
    theirs = [each for each in kind.__mro__ if each.__module__.partition(".")[0] in LIBRARIES]
    assert subclasses
    assert theirs
    bound = set().union(*map(names_bound_by, subclasses))
    assert set(filter(is_private, bound)) & set().union(*map(names_bound_by, theirs)) == set()
