"""The development stack with real servers: start, persistence, refusals, and stop."""

import io
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import httpx2 as httpx
import nats
import pytest
from minio import Minio
from minio.error import S3Error

from consumer.devstack import (
    ChildEndedError,
    ChildProcess,
    Daemon,
    DevStack,
    DevStackError,
    DirectoryInUseError,
    NatsServer,
    NoSpaceError,
    ObjectStore,
    PortTakenError,
    ServerMissingError,
    StartFailedError,
    free_ports,
    loopback,
    orphan_guard,
    process,
)
from consumer.devstack import stack as stack_module
from consumer.devstack.loopback import FreePorts, http_status, require_free
from consumer.devstack.stack import Addresses
from tests.support.plain_s3 import plain_s3_client

_LISTEN = "0A"  # a socket's state in /proc/net/tcp
_SOON = 20.0  # seconds; only bounds a wait for something that must happen


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """Start one stack for all tests that only add a bucket to it."""
    with DevStack(tmp_path_factory.mktemp("stack"), persist=False) as running:
        yield running


def python_child(tmp_path: Path, code: str, **options: object) -> ChildProcess:
    """Return a Python process as a child, for tests that do not depend on the program."""
    return ChildProcess(
        "a program",
        [sys.executable, "-I", "-S", "-c", code],
        log=tmp_path / "log" / "program.log",
        **options,  # type: ignore[arg-type]
    )


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    """Return the listening sockets of a process: {(hexadecimal address, port)}."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = descriptor.readlink()
        except FileNotFoundError:  # the process has closed it
            continue
        if target.name.startswith("socket:["):
            inodes.add(target.name.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == _LISTEN and columns[9] in inodes:
                address, port = columns[1].split(":")
                found.add((address, int(port, 16)))
    return found


class Watched:
    """Any other process, which is killed at the end of the block."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __enter__(self) -> Self:
        self._descriptor = os.pidfd_open(self.pid)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        os.close(self._descriptor)

    def wait_until_ended(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        assert poll.poll(_SOON * 1_000), f"process {self.pid} is still running"


def socket_files() -> set[Path]:
    """Return the socket files of weed; a killed store leaves its files."""
    return set(Path("/tmp").glob("seaweedfs-*-grpc-*.sock"))  # noqa: S108 - weed's folder


def remaining_sockets(store: ObjectStore) -> list[Path]:
    ports = {str(port) for port in store.ports.values()}
    files = [path for path in socket_files() if path.stem.rpartition("-")[2] in ports]
    return [*files, *store.directory.glob("*.sock")]


async def test_the_environment_has_the_settings_of_both_servers(stack: DevStack) -> None:
    settings = stack.environment()
    assert set(settings) == {
        "NATS_URL",
        "S3_ENDPOINT",
        "S3_ACCESS_KEY",
        "S3_SECRET_KEY",
        "S3_BUCKET",
    }

    connection = await nats.connect(settings["NATS_URL"])
    try:
        account = await connection.jetstream().account_info()
        assert account.streams == 0
    finally:
        await connection.close()

    store = Minio(
        settings["S3_ENDPOINT"].removeprefix("http://"),
        access_key=settings["S3_ACCESS_KEY"],
        secret_key=settings["S3_SECRET_KEY"],
        secure=False,
        region="us-east-1",
    )
    assert store.list_buckets() == []
    store.make_bucket(settings["S3_BUCKET"])
    store.put_object(settings["S3_BUCKET"], "a/b", io.BytesIO(b"image"), 5)
    assert store.get_object(settings["S3_BUCKET"], "a/b").read() == b"image"


def test_the_servers_listen_only_on_loopback_and_the_chosen_ports(stack: DevStack) -> None:
    while (
        http_status(stack.store.ports["admin.port"], "/") is None
    ):  # this port opens last, after S3 is ready
        assert stack.store.alive
    address = "0100007F"  # 127.0.0.1 as the kernel writes it
    for server in (stack.nats, stack.store):
        expected = {(address, port) for port in server.ports.values()}
        assert listening_addresses(server.pid) == expected


def test_the_maintenance_worker_of_the_store_connects_to_its_server(stack: DevStack) -> None:
    while "INITIAL CONNECTION" not in (log := stack.store.log_since_start()):
        assert stack.store.alive
        time.sleep(0.01)  # no event reports a change of the file
    assert "INITIAL CONNECTION SUCCESS" in log


def test_the_store_refuses_anonymous_and_wrongly_signed_writes(stack: DevStack) -> None:
    client = plain_s3_client(stack.store)
    client.make_bucket("anonymous")
    with socket.create_connection(("127.0.0.1", stack.store.ports["s3.port"])) as anonymous:
        anonymous.sendall(
            b"PUT /anonymous/a HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Length: 1\r\nConnection: close\r\n\r\nx"
        )
        assert anonymous.makefile("rb").readline().startswith(b"HTTP/1.1 403")
    client_with_wrong_key = plain_s3_client(stack.store, secret_key="another secret")
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        client_with_wrong_key.put_object("anonymous", "a", io.BytesIO(b"x"), 1)
    assert list(client.list_objects("anonymous")) == []


def test_the_filer_refuses_reads_without_credentials(stack: DevStack) -> None:
    client = plain_s3_client(stack.store)
    client.make_bucket("filer")
    client.put_object("filer", "a", io.BytesIO(b"x"), 1)
    assert http_status(stack.store.ports["filer.port"], "/buckets/filer/a") != 200


def test_aws_credentials_in_the_environment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "fromenvironment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secretofenvironment")
    monkeypatch.setenv("S3_BUCKET", "unwanted")
    with ObjectStore(tmp_path / "store") as store:
        client = plain_s3_client(
            store, access_key="fromenvironment", secret_key="secretofenvironment"
        )
        with pytest.raises(S3Error, match="InvalidAccessKeyId"):
            client.make_bucket("generation")


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_a_message_survives_a_restart_on_the_same_ports(tmp_path: Path, how: str) -> None:
    with NatsServer(tmp_path / "nats") as server:
        before = (server.url, server.pid)
        connection = await nats.connect(server.url)
        await connection.jetstream().add_stream(name="KEPT", subjects=["kept"])
        await connection.jetstream().publish("kept", b"a job")
        await connection.close()

        if how == "kill":
            server.kill()
            assert server.returncode == -signal.SIGKILL
            server.start()
            server.wait_ready()
        else:
            server.restart()

        assert server.url == before[0]
        assert server.pid != before[1]
        connection = await nats.connect(server.url)
        try:
            message = await connection.jetstream().get_msg("KEPT", 1)
            assert message.data == b"a job"
        finally:
            await connection.close()


async def test_additional_nats_configuration_is_used(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "nats", config="max_payload: 4096") as server:
        connection = await nats.connect(server.url)
        assert connection.max_payload == 4096
        await connection.close()


def test_a_persistent_stack_keeps_ports_credentials_and_objects(tmp_path: Path) -> None:
    with DevStack(tmp_path / "stack", persist=True) as stack:
        first = stack.environment()
        ports = {**stack.nats.ports, **stack.store.ports}
        client = plain_s3_client(stack.store)
        client.make_bucket("generation")
        client.put_object("generation", "a/b", io.BytesIO(b"image"), 5)
    with DevStack(tmp_path / "stack", persist=True) as stack:
        assert stack.environment() == first
        assert {**stack.nats.ports, **stack.store.ports} == ports
        client = plain_s3_client(stack.store)
        assert client.get_object("generation", "a/b").read() == b"image"


def test_the_files_of_a_stack_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "stack"
    directory.mkdir(mode=0o755)
    with DevStack(directory, persist=True) as stack:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        files = [
            directory / "devstack.json",
            stack.store.directory / "s3.json",
            stack.nats.directory / "nats.conf",
            stack.nats.log,
            stack.store.log,
        ]
        assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * len(files)
        assert stack.store.secret_key not in stack.store.log.read_text()


def test_a_temporary_stack_starts_empty(tmp_path: Path) -> None:
    stack = DevStack(tmp_path / "stack", persist=False)
    keys = set()
    for _ in range(2):
        with stack:
            keys.add(stack.store.secret_key)
            assert plain_s3_client(stack.store).list_buckets() == []
            plain_s3_client(stack.store).make_bucket("generation")
    assert len(keys) == 2
    assert not (tmp_path / "stack" / "devstack.json").exists()


@pytest.mark.parametrize("persist", [True, False])
def test_stop_leaves_no_process_no_port_and_no_socket_file(tmp_path: Path, persist: bool) -> None:
    before = socket_files()
    stack = DevStack(tmp_path / "stack", persist=persist)
    stack.start()
    servers = (stack.nats, stack.store)
    pids = [server.pid for server in servers]

    stack.stop()

    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert set(remaining_sockets(servers[1])) <= before
    for port in [port for server in servers for port in server.ports.values()]:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
    stack.stop()  # a second stop does nothing
    with pytest.raises(DevStackError, match="not running"):
        stack.environment()


def test_all_servers_are_stopped_if_one_stop_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = DevStack(tmp_path / "stack", persist=False)
    stack.start()
    pids = [stack.nats.pid, stack.store.pid]

    def fail() -> None:
        raise OSError("the socket file cannot be removed")

    store = stack.store
    monkeypatch.setattr(store, "_after_exit", fail)
    with pytest.raises(OSError, match="cannot be removed"):
        stack.stop()
    monkeypatch.undo()
    store.kill()  # removes the socket files
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with DevStack(tmp_path / "stack", persist=False):  # the lock is free
        pass


def test_a_directory_in_use_is_refused_with_the_id_of_its_process(
    tmp_path: Path,
) -> None:
    with DevStack(tmp_path / "stack", persist=False) as stack:
        second = DevStack(tmp_path / "stack", persist=False)
        with pytest.raises(DirectoryInUseError, match=rf"in use.*process {os.getpid()}\b"):
            second.start()
        second.stop()
        assert stack.nats.alive
        assert stack.store.alive


def test_a_failed_start_stops_the_started_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[NatsServer] = []
    start = NatsServer.start

    def record(server: NatsServer) -> None:
        start(server)
        started.append(server)

    def interrupt(_store: ObjectStore) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(NatsServer, "start", record)
    monkeypatch.setattr(ObjectStore, "_is_ready", interrupt)
    stack = DevStack(tmp_path / "stack", persist=True)
    with pytest.raises(KeyboardInterrupt):
        stack.start()
    assert [server.alive for server in started] == [False]

    monkeypatch.undo()
    with stack:  # the ports and the lock are free
        assert stack.store.alive


def test_a_stored_port_that_is_taken_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "stack"
    directory.mkdir()
    addresses = Addresses.choose()
    addresses.write(directory / "devstack.json")
    port = addresses.store["admin.port.grpc"]
    monkeypatch.setattr(loopback, "_RELEASE_WAIT", 0.1)
    with socket.create_server(("127.0.0.1", port)):
        stack = DevStack(directory, persist=True)
        with pytest.raises(PortTakenError, match=rf"{port} \(weed, admin.port.grpc\)"):
            stack.start()


def test_the_start_waits_for_the_port_of_a_server_that_is_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ending = socket.create_server(("127.0.0.1", 0))
    waits = []

    def end(seconds: float) -> None:
        waits.append(seconds)
        ending.close()

    monkeypatch.setattr(time, "sleep", end)
    require_free(ending.getsockname()[1], "a server that is ending")
    assert len(waits) == 1


def test_a_temporary_stack_chooses_other_ports_if_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_addresses = Addresses.choose()
    choices = [taken_addresses, Addresses.choose()]
    monkeypatch.setattr(Addresses, "choose", lambda: choices.pop(0))
    monkeypatch.setattr(loopback, "_RELEASE_WAIT", 0.1)
    taken = taken_addresses.store["filer.port"]
    with (
        socket.create_server(("127.0.0.1", taken)),
        DevStack(tmp_path / "stack", persist=False) as stack,
    ):
        assert choices == []
        assert stack.store.ports["filer.port"] != taken


@pytest.mark.parametrize(
    ("kind", "purpose", "message"),
    [
        *((NatsServer, purpose, "address already in use") for purpose in NatsServer.port_names),
        (ObjectStore, "volume.port", "is not available"),
        (ObjectStore, "volume.port.grpc", "is not available"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_server_that_loses_the_race_for_a_port_reports_the_taken_port(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[NatsServer | ObjectStore],
    purpose: str,
    message: str,
) -> None:
    monkeypatch.setattr(process, "require_free", lambda _port, _purpose: None)
    server = kind(tmp_path / "server")
    with (
        socket.create_server(("127.0.0.1", server.ports[purpose])),
        pytest.raises(PortTakenError, match=message),
        server,
    ):
        pass
    assert not server.alive
    # The store names the socket files of its other ports in its log.
    for path in re.findall(r"/\S+/seaweedfs-\S+\.sock", server.log_since_start()):
        Path(path).unlink(missing_ok=True)


def test_a_damaged_file_of_ports_is_reported(tmp_path: Path) -> None:
    (tmp_path / "devstack.json").write_text('{"nats": {"client": 1}}')
    with pytest.raises(DevStackError, match=r"devstack\.json is damaged"):
        DevStack(tmp_path, persist=True).start()


def test_free_ports_differ_and_lie_below_the_ephemeral_range() -> None:
    ports = free_ports(400)
    assert len(set(ports)) == 400
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < first_ephemeral
    with FreePorts() as free:
        pairs = [free.take_pair(10_000) for _ in range(50)]
    assert {second - first for first, second in pairs} == {10_000}
    assert max(second for _, second in pairs) < first_ephemeral


def test_the_port_of_a_child_is_reserved_while_the_child_is_not_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = NatsServer(tmp_path / "nats")
    port = server.ports["client"]
    monkeypatch.setattr(secrets, "randbelow", lambda _limit: port - loopback._LOWEST_PORT)
    with pytest.raises(DevStackError, match="no free port was found"):
        free_ports(1)  # before the first start
    with server:
        server.kill()
        with pytest.raises(DevStackError, match="no free port was found"):
            free_ports(1)
        server.restart()


def test_the_port_of_a_deleted_child_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Daemon("a daemon", {}, log=tmp_path / "log")
    port = child.ports["probes"]
    monkeypatch.setattr(secrets, "randbelow", lambda _limit: port - loopback._LOWEST_PORT)
    with pytest.raises(DevStackError, match="no free port was found"):
        free_ports(1)
    del child
    assert free_ports(1) == [port]


def test_a_child_can_start_after_another_program_has_freed_its_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        child = ChildProcess(
            "a child", ["true"], log=tmp_path / "log", ports={"own": other.getsockname()[1]}
        )
    child.start()  # the other program has ended
    child.stop()


def test_a_missing_server_program_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerMissingError, match=r"nats-server is not installed.*devstack"):
        NatsServer(tmp_path / "nats")


def test_the_error_of_a_failed_start_has_the_end_of_the_log(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats", config="max_payload: much")
    server.start()
    with pytest.raises(
        StartFailedError, match=r"exit code 1; .*nats\.log:\n.*nats\.conf:4"
    ) as failure:
        server.wait_ready()
    assert not isinstance(failure.value, PortTakenError)
    server.stop()


def test_the_reported_log_is_of_the_last_start_and_has_no_secrets(tmp_path: Path) -> None:
    code = (
        "import os; print('key', os.environ['KEY'], 'run', os.environ['RUN']); raise SystemExit(3)"
    )
    child = Daemon("a daemon", {"S3_SECRET_KEY": "hunter2"}, log=tmp_path / "daemon.log")
    child.argv = (sys.executable, "-c", code)
    for run in ("first", "second"):
        child.env = {"KEY": "hunter2", "RUN": run}
        child.start()
        with pytest.raises(StartFailedError, match="exit code 3") as failure:
            child.wait_ready()
        assert str(failure.value).endswith(f"{child.log}:\nkey *** run {run}")


def test_a_child_that_is_not_ready_in_time_fails(tmp_path: Path) -> None:
    daemon = Daemon("a daemon", {}, log=tmp_path / "daemon.log")
    daemon.argv = (
        sys.executable,
        "-c",
        "import signal; print('loading', flush=True); signal.pause()",
    )
    daemon.start()
    with pytest.raises(StartFailedError, match=r"was not ready after 0\.3 s"):
        daemon.wait_ready(0.3)
    assert daemon.alive
    daemon.kill()
    assert not daemon.alive


def test_a_program_that_cannot_be_executed_is_reported_as_a_failed_start(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats")
    server.argv = (str(tmp_path / "ghost"),)
    with pytest.raises(StartFailedError, match=r"(?s)nats-server.*ghost: No such file"), server:
        pass
    child = ChildProcess("x", [sys.executable], log=tmp_path / "x.log", cwd=tmp_path / "nowhere")
    with pytest.raises(StartFailedError, match="nowhere"):
        child.start()
    assert not child.alive


IGNORE_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.parametrize(
    ("in_both", "in_grandchild", "grace", "end"),
    [
        pytest.param(IGNORE_SIGTERM, "pass", 0.2, signal.SIGKILL, id="child ignores SIGTERM"),
        pytest.param("pass", IGNORE_SIGTERM, None, signal.SIGTERM, id="grandchild ignores SIGTERM"),
    ],
)
def test_stop_ends_a_child_and_its_children(
    tmp_path: Path, in_both: str, in_grandchild: str, grace: float | None, end: signal.Signals
) -> None:
    code = (
        f"import os, signal; {in_both}; grandchild = os.fork()\n"
        "if grandchild: os.write(1, f'{grandchild}\\n'.encode())\n"
        f"else: {in_grandchild}\n"
        "signal.pause()"
    )
    options = {} if grace is None else {"grace": grace}
    with (
        python_child(tmp_path, code, **options) as child,
        Watched(int(first_line(child))) as grandchild,
    ):
        child.stop()
        assert child.returncode == -end
        grandchild.wait_until_ended()


def first_line(child: ChildProcess) -> str:
    """Wait for the first line of a child's output, and return it."""
    while not (written := child.log_since_start().partition("\n"))[1]:
        assert child.alive
        time.sleep(0.01)  # no event reports a change of the file
    return written[0]


def test_an_interrupt_during_stop_kills_the_child_immediately(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))\n"
        "print('armed', flush=True)\n"
        "while True: signal.pause()"
    )
    with python_child(tmp_path, code, grace=_SOON) as child:
        assert first_line(child) == "armed"
        with pytest.raises(KeyboardInterrupt):
            child.stop()
        assert child.returncode == -signal.SIGKILL


def test_a_child_runs_in_a_separate_session(
    tmp_path: Path,
) -> None:
    with python_child(tmp_path, "import signal; signal.pause()") as child:
        assert os.getsid(child.pid) == child.pid
        assert os.getsid(0) != child.pid


def test_a_running_child_cannot_be_started_again(tmp_path: Path) -> None:
    with (
        python_child(tmp_path, "import signal; signal.pause()") as child,
        pytest.raises(RuntimeError, match="runs already"),
    ):
        child.start()


def test_a_signal_is_sent_to_a_child_and_ignored_after_its_end(tmp_path: Path) -> None:
    with python_child(tmp_path, "import signal; signal.pause()") as child:
        with Watched(child.pid) as watched:
            child.signal(signal.SIGUSR1)
            watched.wait_until_ended()
        assert child.returncode == -signal.SIGUSR1
        child.signal(signal.SIGUSR1)


def test_a_child_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    code = "import signal; print('up', flush=True); signal.pause()"
    child = python_child(tmp_path, code)

    def start() -> None:
        child.start()
        assert first_line(child) == "up"

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert child._spawned is not None
    with child._spawned.result() as running:
        # Linux sends a parent-death signal when the thread ends, which is after join returns.
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.3)
        child.stop()
    assert child.returncode == -signal.SIGTERM


def test_the_orphan_guard_starts_nothing_for_a_dead_parent(tmp_path: Path) -> None:
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    result = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            orphan_guard.__file__,
            str(ended.pid),
            "/bin/touch",
            str(tmp_path / "started"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "the parent ended" in result.stderr
    assert not (tmp_path / "started").exists()


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import json, signal, sys\n"
        "from pathlib import Path\n"
        "from consumer.devstack import DevStack\n"
        "with DevStack(Path(sys.argv[1]), persist=True) as stack:\n"
        "    print(json.dumps([stack.nats.pid, stack.store.pid]), flush=True)\n"
        "    signal.pause()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "stack")], stdout=subprocess.PIPE, text=True
    )
    with parent, ExitStack() as ends:
        ends.callback(parent.kill)
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        servers = [ends.enter_context(Watched(pid)) for pid in pids]
        parent.kill()
        parent.wait()
        for server in servers:
            server.wait_until_ended()
    with DevStack(tmp_path / "stack", persist=True) as stack:  # the lock and the ports are free
        assert stack.nats.pid not in pids
        assert stack.store.alive


def test_a_daemon_gets_only_the_server_settings_of_its_stack(
    stack: DevStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_CREDS", "someone.creds")
    monkeypatch.setenv("S3_PUBLIC_ENDPOINT", "https://elsewhere.example")
    monkeypatch.setenv("MODEL_DEVICE", "cpu")
    daemon = Daemon("text_to_image", stack.environment(), log=stack.directory / "daemon.log")
    assert daemon.env is not None
    servers = {key: value for key, value in daemon.env.items() if key.startswith(("NATS_", "S3_"))}
    assert servers == stack.environment()
    assert daemon.env["MODEL_DEVICE"] == "cpu"
    assert daemon.env["CONSUMER_PROBES_PORT"] == str(daemon.ports["probes"])
    assert daemon.argv[-3:] == ("-m", "consumer", "run")


def test_a_folder_named_consumer_does_not_shadow_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "consumer").mkdir()
    (tmp_path / "consumer" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    daemon = Daemon("a daemon", {}, log=tmp_path / "daemon.log")
    interpreter = daemon.argv[: daemon.argv.index("-m")]
    subprocess.run([*interpreter, "-c", "import consumer"], cwd=tmp_path, check=True)


def test_all_streams_fit_whatever_the_free_space_of_the_disk_is(stack: DevStack) -> None:
    # By default, streams may reserve 75% of the free space. One installation reserves 7.4 GiB.
    limits = httpx.get(f"{stack.nats.monitoring_url}/jsz").json()["config"]
    assert limits["max_storage"] == 2**40


def test_a_start_without_space_names_the_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=19_000_000))
    with pytest.raises(NoSpaceError, match="has 19 MB of free space; the servers need 20 MB: free"):
        DevStack(tmp_path / "stack", persist=False).start()


def test_a_server_that_ends_is_reported_with_its_code_and_the_end_of_its_log(
    tmp_path: Path,
) -> None:
    with DevStack(tmp_path / "stack", persist=False) as stack:
        stack.require_alive()
        with Watched(stack.nats.pid) as server:
            os.kill(stack.nats.pid, signal.SIGKILL)
            server.wait_until_ended()
        with pytest.raises(ChildEndedError) as caught:
            stack.require_alive()
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "nats-server ended by itself with code -9 (SIGKILL); "
        f"the end of its log {stack.logs / 'nats.log'}:"
    )
    assert 0 < len(lines) <= 15
    assert "Server is ready" in "".join(lines)


def test_a_server_that_ends_stops_the_wait_for_a_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DevStack(tmp_path / "stack", persist=False) as stack:
        stack.daemons.append(python_child(tmp_path, "import time; time.sleep(60)"))  # type: ignore[arg-type]
        stack.daemons[0].start()

        def never_ready(_: ChildProcess) -> bool:
            stack.store.kill()
            return False

        monkeypatch.setattr(ChildProcess, "_is_ready", never_ready)
        try:
            with pytest.raises(ChildEndedError, match="weed ended by itself with code -9"):
                stack.wait_ready()
        finally:
            stack.daemons[0].kill()


def test_the_message_about_a_child_whose_log_was_deleted_has_no_lines(tmp_path: Path) -> None:
    child = python_child(tmp_path, "print('a line')")
    child.start()
    with Watched(child.pid) as process:
        process.wait_until_ended()
    child.log.unlink()
    assert str(child.ended_error()) == (
        f"a program ended with exit code 0; there is nothing in its log {child.log}"
    )


def test_daemons_and_gateways_keep_their_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChildProcess, "start", lambda _: None)  # only the ports matter here
    monkeypatch.setattr(ChildProcess, "wait_ready", lambda *_, **__: None)
    ports = []
    for _ in range(2):
        with DevStack(tmp_path / "stack", persist=True) as stack:
            daemon = stack.start_daemon("text_to_image", {})
            gateway = stack.start_gateway("gateway", {})
            ports.append((daemon.ports, gateway.ports))
            del daemon, gateway, stack
    assert ports[0] == ports[1]
    assert Addresses.read(tmp_path / "stack" / "devstack.json").children == {
        "text_to_image": ports[0][0]["probes"],
        "gateway": ports[0][1]["http"],
    }


DRAINS = """
import signal, sys
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print("ready", flush=True)
while len(signals) < {after}:
    signal.pause()
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "hangs"])
def test_a_persistent_stack_stops_gateways_when_its_daemons_have_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    # The gateway drains at the first signal: it would refuse requests while the daemon still runs.
    monkeypatch.setattr(stack_module, "_IDLE_STOP", 0.0)
    monkeypatch.setattr(stack_module, "_GATEWAY_GRACE", 0.1 if hangs else 60.0)
    told: list[tuple[list[str], bool]] = []
    release = tmp_path / "release"
    code = DRAINS.format(after=1) + f"open({str(release)!r}, 'rb').read()"
    os.mkfifo(release)

    def finish_the_run(names: list[str]) -> None:
        told.append((names, gateway.alive))
        release.write_bytes(b"")

    stack = DevStack(tmp_path / "stack", persist=True, on_drain=finish_the_run)
    with stack:
        daemon = python_child(tmp_path / "daemon", code)
        gateway = python_child(tmp_path / "gateway", DRAINS.format(after=hangs + 1))
        for child, among in ((daemon, stack.daemons), (gateway, stack._gateways)):
            among.append(child)  # type: ignore[arg-type]
            stack._started.callback(child.stop)
            child.start()
            while "ready" not in child.log_since_start():
                assert child.alive
                time.sleep(0.01)  # no event reports a change of the file
        # `stop` of a child sends its signal in another way.
        monkeypatch.setattr(gateway, "signal", lambda _: pytest.fail("drained too early"))
    assert told == [([daemon.name], True)]
    assert (daemon.returncode, gateway.returncode) == (0, -signal.SIGKILL if hangs else 0)


def damaged(path: Path, **changes: object) -> str:
    """Return the text of a state file with some values replaced."""
    Addresses.choose().write(path)
    return json.dumps({**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: "null",
        lambda _: "[]",
        lambda path: damaged(path, nats={"client": 1, "monitoring": 99_999}),
        lambda path: damaged(path, store=2),
        lambda path: damaged(path, children=[3]),
        lambda path: damaged(path, credentials={"access_key": "a", "secret_key": None}),
        lambda path: damaged(path, credentials={"other": "a"}),
    ],
    ids=[
        "empty",
        "null",
        "list",
        "impossible port",
        "number instead of ports",
        "list of children",
        "no secret",
        "other credentials",
    ],
)
def test_a_damaged_state_file_is_reported(tmp_path: Path, change: Callable[[Path], str]) -> None:
    state = tmp_path / "devstack.json"
    state.write_text(change(state))
    with pytest.raises(DevStackError, match=r"devstack\.json is damaged"):
        DevStack(tmp_path, persist=True).start()
