"""The connection to a real server: refusals, losses, reconnects and closing."""

import asyncio
import json
import re
import signal
import time
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from consumer.bus import connection
from consumer.bus import topology as topology_module
from consumer.bus.connection import (
    Bus,
    BusMisconfigured,
    BusUnavailable,
    ServerTooOld,
    connect,
    require_server_version,
    wait_until_available,
)
from consumer.bus.topology import Topology, TopologyError
from consumer.devstack import NatsServer, free_ports
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import Subjects, Task
from tests.conftest import StartNats
from tests.integration.bus_installation import (
    SOON,
    bus_settings,
    frozen,
    measured,
    open_bus,
    soon,
    until,
    until_connected,
    until_lost,
)

SECRET = "a-secret-of-the-url"
WITHIN = 0.6  # seconds; enough for two attempts


async def connect_error(url: str) -> str:
    """Connect, which must fail; return the error, which contains no secret."""
    started = time.monotonic()
    with capture_logs() as logs, pytest.raises(BusUnavailable) as caught:
        await soon(connect(bus_settings(url), name="test", within=WITHIN))
    measured(f"error within {WITHIN} s", time.monotonic() - started)
    text = str(caught.value)
    assert SECRET not in text + repr(logs)
    assert "\n" not in text
    assert caught.value.__suppress_context__
    return text


async def test_the_error_of_a_refused_connection_contains_no_credentials() -> None:
    (port,) = free_ports(1)
    text = await connect_error(f"nats://user:{SECRET}@127.0.0.1:{port}")
    assert text == f"NATS: cannot connect to nats://127.0.0.1:{port}: Connection refused"


async def test_an_outage_is_one_line_with_a_count() -> None:
    (port,) = free_ports(1)
    with capture_logs() as logs, pytest.raises(BusUnavailable):
        await soon(connect(bus_settings(f"nats://127.0.0.1:{port}"), name="test", within=WITHIN))
    assert [line["event"] for line in logs] == ["bus_error", "bus_not_connected"]
    assert logs[0]["servers"] == f"nats://127.0.0.1:{port}"
    assert logs[1]["attempts"] > 1


async def test_a_reason_is_logged_once_while_the_bus_is_not_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "START_PAUSE", 0.0)
    reasons = iter(["one", "one", "one", "two"])

    async def attempt() -> str:
        for reason in reasons:
            raise BusUnavailable(reason)
        return "available"

    with capture_logs() as logs:
        deadline = time.monotonic() + 60
        assert await soon(wait_until_available(attempt, deadline=deadline)) == "available"
    assert [line["reason"] for line in logs] == ["one", "two"]


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("2.10.22", False),
        ("2.11.9", False),
        ("2.9.0-beta.1", False),
        ("1.4.1", False),
        ("2.12.0-preview.1", True),
        ("2.12.0-RC.3", True),
        ("2.12.0", True),
        ("2.15.1", True),
        ("v2.12.1", True),
        ("3.0.0", True),
        ("my-build", True),
        ("", True),
    ],
)
def test_a_server_older_than_the_requirement_is_refused(version: str, accepted: bool) -> None:
    bus = Bus()
    bus.client._server_info = {"version": version}
    with nullcontext() if accepted else pytest.raises(ServerTooOld, match=re.escape(version)):
        require_server_version(bus)


async def test_the_error_of_a_silent_server_contains_no_credentials() -> None:
    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await closing.wait()
        writer.close()

    closing = asyncio.Event()
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        assert "cannot connect" in await connect_error(f"nats://user:{SECRET}@127.0.0.1:{port}")
        closing.set()


@pytest.mark.parametrize("user", [f"user:{SECRET}", f"user:{SECRET}x", SECRET])
async def test_wrong_credentials_are_reported_as_refused(start_nats: StartNats, user: str) -> None:
    server = start_nats('authorization { user: "user", password: "right" }')
    text = await connect_error(server.url.replace("//", f"//{user}@"))
    assert text == f"NATS: the credentials are refused by {server.url}"


async def require_connection(settings: Settings) -> None:
    bus = await soon(connect(settings, name="test", within=WITHIN))
    await bus.close()
    async with GenerationClient(settings.nats_url, **settings.nats_servers.credentials) as client:
        await client._connected.flush()


@pytest.mark.parametrize(
    ("user", "password", "in_url"),
    [
        ("app", "p@ss", "app:p%40ss"),
        ("a:b", "/#?,% ü", "a%3Ab:%2F%23%3F%2C%25%20%C3%BC"),
        ("app", "p+s:s", "app:p+s:s"),
    ],
)
async def test_user_information_in_an_address_is_percent_encoded(
    start_nats: StartNats, user: str, password: str, in_url: str
) -> None:
    server = start_nats(f"authorization {{ user: {json.dumps(user)}, {_password(password)} }}")
    await require_connection(bus_settings(server.url.replace("//", f"//{in_url}@")))
    named = bus_settings(server.url).model_copy(
        update={"nats_user": user, "nats_password": SecretStr(password)}
    )
    await require_connection(named)


async def test_a_discovered_server_gets_the_user_of_the_address(
    tmp_path: Path,
) -> None:
    """nats-py itself sends no user to a discovered server, and could not fail over to it."""
    routes = dict(zip("ab", free_ports(2), strict=True))
    first, second = (
        NatsServer(
            tmp_path / name,
            config=f"""
            server_name: {name}
            authorization {{ user: "app", password: "p@ss" }}
            cluster {{
              name: test, listen: "127.0.0.1:{port}"
              routes: {json.dumps([f"nats://127.0.0.1:{route}" for route in routes.values()])}
            }}
            """,
        )
        for name, port in routes.items()
    )
    async with AsyncExitStack() as parts:
        for server in (first, second):
            parts.callback(server.kill)
            server.start()
        for server in (first, second):
            await asyncio.to_thread(server.wait_ready)  # each server has found the other one
        bus = await open_bus(first.url.replace("//", "//app:p%40ss@"), parts)

        async def discovered() -> bool:
            return bool(bus.client.discovered_servers)

        await until(discovered)  # the first server may announce the other one later

        async def connected_to_the_second() -> bool:
            # Waiting for the loss first would miss it: the client reconnects within milliseconds.
            url = bus.client.connected_url
            return url is not None and url.port == second.ports["client"]

        first.kill()
        await until(connected_to_the_second)
        await until_connected(bus)


async def test_a_token_in_an_address_is_percent_encoded(start_nats: StartNats) -> None:
    server = start_nats('authorization { token: "t@k/n" }')
    await require_connection(bus_settings(server.url.replace("//", "//t%40k%2Fn@")))


def _password(password: str) -> str:
    return f"password: {json.dumps(password, ensure_ascii=False)}"


async def test_the_error_of_a_missing_credentials_file_names_the_setting(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    for name in ("nats_creds", "nats_nkey_seed", "nats_ca"):
        settings = bus_settings(nats_server.url).model_copy(update={name: tmp_path / "none"})
        with pytest.raises(
            BusUnavailable, match=rf"cannot be read: {name.upper()}: .*No such file"
        ):
            await soon(connect(settings, name="test", within=WITHIN))


async def test_the_client_waits_for_a_server_that_learns_the_user_later(
    start_nats: StartNats, tmp_path: Path
) -> None:
    """The server reloads its configuration while the daemon starts."""
    users = 'authorization { user: "user", password: "%s" }'
    server = start_nats(users % "old")
    url = server.url.replace("//", f"//user:{SECRET}@")
    connecting = asyncio.create_task(connect(bus_settings(url), name="test", within=SOON))
    await asyncio.wait({connecting}, timeout=WITHIN)
    assert not connecting.done()
    file = tmp_path / "nats-0" / "nats.conf"
    file.write_text(file.read_text().replace(users % "old", users % SECRET))
    server.signal(signal.SIGHUP)
    bus = await soon(connecting)
    assert bus.connected
    await bus.close()


@pytest.mark.parametrize(
    ("failures", "raised", "calls"),
    [
        pytest.param([BusUnavailable("1"), BusUnavailable("2")], None, 3, id="available later"),
        pytest.param([BusMisconfigured("1")], BusMisconfigured, 1, id="misconfigured"),
        pytest.param([TopologyError("1")], TopologyError, 1, id="another error"),
        pytest.param([BusUnavailable("no")] * 1_000, BusUnavailable, None, id="never available"),
    ],
)
async def test_an_unavailable_bus_is_retried_at_the_start_and_a_misconfigured_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
    failures: list[Exception],
    raised: type[Exception] | None,
    calls: int | None,
) -> None:
    monkeypatch.setattr(connection, "START_PAUSE", 0.01)
    called = 0

    async def attempt() -> str:
        nonlocal called
        called += 1
        if called <= len(failures):
            raise failures[called - 1]
        return "done"

    waiting = wait_until_available(attempt, deadline=time.monotonic() + WITHIN)
    if raised is None:
        assert await soon(waiting) == "done"
    else:
        with pytest.raises(raised):
            await soon(waiting)
    assert called == calls if calls is not None else called > 2


async def test_an_api_call_without_permission_is_a_misconfiguration(
    start_nats: StartNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology_module, "API_TIMEOUT", 0.5)
    permissions = '{ publish: ["_INBOX.>"] }'
    user = f'{{ user: "a", password: "x", permissions: {permissions} }}'
    server = start_nats(f"authorization {{ users: [ {user} ] }}")
    async with AsyncExitStack() as parts:
        bus = await open_bus(server.url.replace("//", "//a:x@"), parts)
        topology = Topology(bus, Subjects(), ack_wait=60, max_ack_pending=1)
        with pytest.raises(BusMisconfigured, match="permissions violation"):
            await soon(topology.ensure(Task.TEXT_TO_IMAGE))


async def test_the_second_of_two_servers_is_used_when_the_first_is_down(
    nats_server: NatsServer,
) -> None:
    (port,) = free_ports(1)
    async with AsyncExitStack() as parts:
        bus = await open_bus(f"nats://127.0.0.1:{port},{nats_server.url}", parts)
        assert bus.connected


async def test_the_client_reconnects_after_a_restart_of_the_server(nats_server: NatsServer) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)
        reconnected = asyncio.Event()
        bus.on_reconnect(reconnected.set)
        nats_server.kill()
        await until_lost(bus)
        nats_server.start()
        nats_server.wait_ready()
        returned = time.monotonic()
        await soon(reconnected.wait())
        measured("server's return to reconnected", time.monotonic() - returned)
        await until_connected(bus)
        assert not bus.closed.is_set()


async def test_wait_connected_waits_before_nats_py_reports_the_lost_server(
    nats_server: NatsServer,
) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)
        await soon(bus.wait_connected())
        nats_server.kill()
        await until_lost(bus)
        bus._up.set()  # nats-py calls the disconnect callback later
        waiting = asyncio.create_task(bus.wait_connected())
        await asyncio.wait({waiting}, timeout=0.05)
        assert not waiting.done()
        nats_server.start()
        await soon(waiting)
        assert bus.connected


async def test_closed_is_set_when_the_client_gives_up(nats_server: NatsServer) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)
        # nats-py accepts this message because it does not count the headers; the server refuses it.
        body = bytes(bus.client.max_payload)
        await bus.client.publish("anything", body, headers={"one": "more"})
        await soon(bus.closed.wait())
        assert not bus.connected


async def test_close_sends_buffered_messages(nats_server: NatsServer) -> None:
    async with AsyncExitStack() as parts:
        subscriber = await open_bus(nats_server.url, parts)
        subscription = await subscriber.client.subscribe("news")
        await subscriber.client.flush()

        bus = await open_bus(nats_server.url, parts)
        await bus.client.publish("news", b"buffered")
        await bus.close()

        assert bus.closed.is_set()
        assert (await subscription.next_msg(timeout=5)).data == b"buffered"


async def test_flush_returns_when_the_server_has_processed_everything(
    nats_server: NatsServer,
) -> None:
    async with AsyncExitStack() as parts:
        bus, other = (
            await open_bus(nats_server.url, parts),
            await open_bus(nats_server.url, parts),
        )
        for n in range(200):
            subscription = await bus.client.subscribe(f"news.{n}")
            await bus.client.flush()
            await other.client.publish(f"news.{n}", b"now")
            assert (await subscription.next_msg(timeout=5)).data == b"now"


async def test_a_cancelled_flush_does_not_break_the_connection(nats_server: NatsServer) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)
        subscription = await bus.client.subscribe("news")
        await bus.client.flush()
        with frozen(nats_server):
            flushing = asyncio.create_task(bus.client.flush())
            await asyncio.sleep(0)  # the client has sent its PING
            flushing.cancel()
            await asyncio.wait({flushing})
        await soon(bus.client.flush())  # its PONG follows the PONG of the cancelled flush
        await bus.client.publish("news", b"now")
        assert (await subscription.next_msg(timeout=5)).data == b"now"


async def test_close_does_not_wait_for_a_frozen_server(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.2)
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)

        async def fill_buffers() -> None:
            while True:  # until the buffers of the socket and of nats-py are full
                await bus.client.publish("anything", bytes(1_000_000))

        with frozen(nats_server):
            filling = asyncio.create_task(fill_buffers())
            await asyncio.wait({filling}, timeout=0.3)
            assert not filling.done()
            started = time.monotonic()
            await bus.close()
            measured("close with full buffers and a frozen server", time.monotonic() - started)
            assert bus.closed.is_set()
        filling.cancel()
        await asyncio.wait({filling})


async def test_a_connection_loss_while_an_api_call_expires_raises_only_the_timeout(
    nats_server: NatsServer,
) -> None:
    async with AsyncExitStack() as parts:
        bus = await open_bus(nats_server.url, parts)

        async def call() -> None:
            async with bus.api_call(0.0):
                try:
                    await asyncio.Event().wait()
                finally:
                    await bus._on_disconnect()

        with pytest.raises(TimeoutError):
            await call()
