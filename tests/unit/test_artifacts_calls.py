"""Aborted blocking calls: which connections are closed."""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from consumer.artifacts.calls import Calls, _Call, connection_pools
from consumer.ports.store import StoreUnavailable

SOON = 30.0  # seconds; only bounds a wait for something that must happen


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    yield calls
    calls.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(SOON)
        yield near, far


def is_open(far: socket.socket) -> bool:
    far.settimeout(0)
    try:
        return far.recv(1) != b""
    except BlockingIOError:
        return True


async def test_results_and_errors_are_returned(calls: Calls) -> None:
    def fails() -> None:
        raise KeyError("x")

    assert await calls.run(lambda: 7) == 7
    with pytest.raises(KeyError):
        await calls.run(fails)
    assert calls._in_progress == []  # no call is left


async def test_calls_after_close_are_refused(calls: Calls) -> None:
    calls.close()
    with pytest.raises(StoreUnavailable, match="the client is closed"):
        await calls.run(lambda: 7)


def test_abort_ends_a_blocked_read(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    call = _Call()

    def read() -> bytes:
        _Call.in_thread.call.set_connection(near)
        near.send(b"!")
        return near.recv(1)

    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(call.run, read)
        assert far.recv(1) == b"!"
        call.abort()
        assert reading.result(SOON) == b""
    assert not is_open(far)


def test_connection_opened_after_the_abort_is_shut_down(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    call = _Call()
    call.abort()
    call.set_connection(near)
    assert not is_open(far)


def test_released_connection_is_not_shut_down(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    call = _Call()
    call.run(lambda: call.set_connection(near))
    call.abort()
    assert is_open(far)
    assert _Call.in_thread.call is None


def test_abort_ignores_a_closed_connection(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, _ = ends
    call = _Call()
    call.set_connection(near)
    near.close()
    call.abort()


async def test_call_on_a_kept_alive_connection_can_be_aborted(calls: Calls) -> None:
    requests: asyncio.Queue[int] = asyncio.Queue()  # the number of its connection, for each
    gone = asyncio.Event()
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        requests.put_nowait(connections)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.readuntil(b"\r\n\r\n")
        requests.put_nowait(connections)
        await reader.read()  # no response until the client disconnects
        gone.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    pools = connection_pools(connect_timeout=600, read_timeout=600)
    async with server, asyncio.timeout(SOON):
        assert (await calls.run(lambda: pools.request("GET", url))).data == b"ok"
        second = asyncio.create_task(calls.run(lambda: pools.request("GET", url)))
        assert [await requests.get(), await requests.get()] == [1, 1]
        second.cancel()
        await gone.wait()
        await asyncio.wait([second])
    assert second.cancelled()
    pools.clear()
