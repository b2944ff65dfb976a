"""Operation of a gateway: start, keys, probes, metrics, log, TLS, limits and drain."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from consumer.app.apply import apply
from consumer.devstack import DevStack, GatewayServer, free_ports
from consumer.gateway import serve
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from consumer.settings import Settings
from tests.support.forked import ForkedGateway

WITHIN = 20.0  # seconds

Start = Callable[..., GatewayServer]


@pytest.fixture(scope="module")
def idle(stack: DevStack) -> dict[str, str]:
    """Settings of an installation without workers."""
    environment: dict[str, Any] = {**stack.environment(), "CONSUMER_SUBJECT_ROOT": "idle"}
    settings = Settings(**{name.lower(): value for name, value in environment.items()})
    asyncio.run(apply(settings))
    return environment


@pytest.fixture
def start(idle: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a gateway, by default without workers."""
    numbers = itertools.count()
    with contextlib.ExitStack() as running:

        def start_gateway(*, patch: str = "", ready: bool = True, **settings: str) -> GatewayServer:
            environment = {**idle, **settings}
            log = tmp_path / f"log-{next(numbers)}"
            gateway = ForkedGateway("gateway", environment, log=log, patch=patch)
            running.callback(gateway.kill)
            gateway.start()
            if ready:
                gateway.wait_ready()
            return gateway

        yield start_gateway


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def consumer(*arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "consumer", *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines_of(gateway: GatewayServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gateway.log_since_start().splitlines()]


def events_of(gateway: GatewayServer) -> list[str]:
    return [line["event"] for line in lines_of(gateway)]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def ended(gateway: GatewayServer) -> int | None:
    wait_for(lambda: not gateway.alive, "the gateway does not stop")
    return gateway.returncode


def metric(gateway: GatewayServer, name: str, **labels: str) -> float:
    """Return the value of a time series; 0 if there is none."""
    expected = {f'{label}="{value}"' for label, value in labels.items()}
    for line in httpx2.get(f"{gateway.url}/metrics").text.splitlines():
        series, _, value = line.rpartition(" ")
        found, _, its_labels = series.rstrip("}").partition("{")
        if found == name and set(filter(None, its_labels.split(","))) == expected:
            return float(value)
    return 0.0


def in_background(call: Callable[[], httpx2.Response]) -> Callable[[], httpx2.Response]:
    """Start a call in a thread; return a function that waits for its response."""
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()

    def answer() -> httpx2.Response:
        thread.join(WITHIN)
        assert answers, "there was no answer"
        return answers[0]

    return answer


IMAGE = {"prompt": "a red circle", "size": "64x64"}


# -- start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("GATEWAY_HOST", "0.0.0.0", "without GATEWAY_KEYS"),  # noqa: S104 - the gateway refuses it
        ("GATEWAY_CORS_ORIGINS", "*", "* needs GATEWAY_KEYS"),
    ],
)
def test_without_keys_settings_for_other_hosts_are_refused(
    name: str, value: str, reason: str
) -> None:
    done = consumer("gateway", **{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"consumer: {name}: {reason}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{"])
def test_unusable_keys_stop_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    done = consumer("gateway", GATEWAY_KEYS=str(path), GATEWAY_PORT=str(free_ports(1)[0]))
    assert done.returncode == 2
    assert done.stderr.startswith("consumer: GATEWAY_KEYS: ")
    assert done.stderr.count("\n") == 1


def test_an_address_in_use_stops_the_start(stack: DevStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = consumer("gateway", **stack.environment(), GATEWAY_PORT=str(port))
    assert done.returncode == 69
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["reason"] == f"127.0.0.1:{port}: Address already in use"


def test_responses_are_sent_without_delay() -> None:
    """Without TCP_NODELAY, each later response body waits for the client's delayed ACK."""
    (port,) = free_ports(1)
    (listener,) = serve._listen(Settings(gateway_port=port))
    with listener, socket.create_connection(("127.0.0.1", port)), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_missing_nats_server_stops_the_start_with_69(start: Start) -> None:
    (port,) = free_ports(1)
    url = f"nats://someone:secret@127.0.0.1:{port}"
    gateway = start(ready=False, patch="app.CONNECT_WITHIN = 0.5", NATS_URL=url)
    assert ended(gateway) == 69
    assert events_of(gateway)[-1] == "service_unavailable"
    assert "secret" not in gateway.log.read_text()


def test_a_gateway_without_keys_logs_a_warning(start: Start) -> None:
    gateway = start()
    ready, opened = lines_of(gateway)[:2]
    assert (ready["event"], ready["url"]) == ("gateway_ready", gateway.url)
    assert (opened["event"], opened["level"]) == ("gateway_without_keys", "warning")


@pytest.mark.parametrize(
    "settings", [{}, {"GATEWAY_CORS_ORIGINS": "http://friend.example"}], ids=["default", "cors"]
)
def test_pages_of_other_hosts_cannot_use_a_gateway_without_keys(
    start: Start, settings: dict[str, str]
) -> None:
    gateway = start(**settings)
    rebound = httpx2.get(f"{gateway.url}/v1/models", headers={"host": "evil.example"})
    assert rebound.status_code == 403
    assert rebound.json()["error"]["code"] == "loopback_only"
    for origin in ("http://evil.example", "null"):
        posted = httpx2.post(f"{gateway.url}/v1/jobs", json={}, headers={"origin": origin})
        assert posted.status_code == 403
    same_origin = httpx2.post(f"{gateway.url}/v1/jobs", json={}, headers={"origin": gateway.url})
    assert same_origin.status_code == 400
    port = gateway.url.rpartition(":")[2]
    assert httpx2.get(f"http://localhost:{port}/v1/models").status_code == 200


# -- keys -----------------------------------------------------------------------------------------


def test_keys_can_be_added_listed_and_revoked_at_runtime(start: Start, keys: KeyFile) -> None:
    settings = {"GATEWAY_KEYS": str(keys.path)}
    added = consumer("gateway", "keys", "add", "acme", "--steps", "4", **settings)
    assert added.returncode == 0, added.stderr
    key = added.stdout.removesuffix("\n")
    gateway = start(**settings)
    assert "gateway_without_keys" not in events_of(gateway)

    def models(with_key: str) -> httpx2.Response:
        headers = {"authorization": f"Bearer {with_key}"}
        return httpx2.get(f"{gateway.url}/v1/models", headers=headers)

    assert models(key).status_code == 200
    later = consumer("gateway", "keys", "add", "other", **settings).stdout.removesuffix("\n")
    assert models(later).status_code == 200
    listed = consumer("gateway", "keys", "list", "--json", **settings).stdout
    entries = [json.loads(line) for line in listed.splitlines()]
    assert [(entry["tenant"], entry["bounds"]) for entry in entries] == [
        ("acme", {"steps": 4}),
        ("other", {}),
    ]
    plain = consumer("gateway", "keys", "list", **settings).stdout
    assert plain.splitlines()[0].endswith("  acme  steps=4")
    revoked = consumer("gateway", "keys", "revoke", entries[0]["id"], **settings)
    assert revoked.returncode == 0
    assert models(key).status_code == 401
    assert models(later).status_code == 200
    assert key not in listed + plain + gateway.log.read_text()
    again = consumer("gateway", "keys", "revoke", entries[0]["id"], **settings)
    assert (again.returncode, again.stderr) == (2, "consumer: there is no key of this id\n")


def test_the_key_commands_require_the_setting() -> None:
    for command in (("add", "acme"), ("list",), ("revoke", "aaaaaaaa")):
        done = consumer("gateway", "keys", *command)
        assert (done.returncode, done.stderr) == (
            2,
            "consumer: GATEWAY_KEYS: set it to the path of the key file\n",
        )


def test_only_probes_and_pages_need_no_key(start: Start, keys: KeyFile) -> None:
    keys.add("acme", Bounds())
    gateway = start(GATEWAY_KEYS=str(keys.path))
    for path in ("/healthz", "/readyz", "/metrics"):
        assert httpx2.get(gateway.url + path).status_code == 200
    # The conditions in docs/reference/observability.md.
    assert httpx2.get(f"{gateway.url}/readyz").json().keys() == {"bus", "keys", "gateway"}
    document = httpx2.get(f"{gateway.url}/openapi.json").json()
    without = {"/healthz", "/readyz", "/metrics", "/", "/{name}"}
    for path, methods in document["paths"].items():
        if path in without:
            continue
        for method in methods:
            answer = httpx2.request(method, gateway.url + path.format_map(_AnyId()), json={})
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"


class _AnyId(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return "1"


def test_bounds_lead_to_standard_errors(start: Start, keys: KeyFile) -> None:
    key = keys.add("acme", Bounds(pixels=64 * 64, steps=2, per_minute=1)).text
    gateway = start(GATEWAY_KEYS=str(keys.path))
    headers = {"authorization": f"Bearer {key}", "prefer": "respond-async"}

    def draw(**fields: object) -> httpx2.Response:
        body = {**IMAGE, **fields}
        return httpx2.post(f"{gateway.url}/v1/images/generations", json=body, headers=headers)

    large = draw(size="128x64")
    assert large.status_code == 400
    assert large.json()["error"]["code"] == "bound_exceeded"
    assert draw(num_inference_steps=3).json()["error"]["param"] == "num_inference_steps"
    assert draw().status_code == 202
    often = draw()
    assert often.status_code == 429
    assert often.json()["error"]["code"] == "rate_limit_exceeded"
    assert often.headers["x-should-retry"] == "true"
    assert 0 < int(often.headers["retry-after"]) <= 60
    assert metric(gateway, "generation_gateway_refused_total", reason="bound_exceeded") == 2
    assert metric(gateway, "generation_gateway_refused_total", reason="rate_limit_exceeded") == 1


def test_the_waiting_bound_covers_all_gateways_and_keys(start: Start, keys: KeyFile) -> None:
    """There is no worker, so queued requests wait."""
    bounds = Bounds(waiting=2)
    first, second = keys.add("acme", bounds).text, keys.add("acme", bounds).text
    other_tenant = keys.add("other", bounds).text
    here, there = start(GATEWAY_KEYS=str(keys.path)), start(GATEWAY_KEYS=str(keys.path))

    def submit(gateway: GatewayServer, key: str, idempotency_key: str = "") -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"}
        if idempotency_key:
            headers["idempotency-key"] = idempotency_key
        job = {"task": "text_to_image", "prompt": "a red circle"}
        return httpx2.post(f"{gateway.url}/v1/jobs", json=job, headers=headers)

    assert submit(here, first).status_code == 202
    assert submit(here, second, "poster").status_code == 202
    for gateway in (there, here):
        refused = submit(gateway, second)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_waiting"
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after"]) > 0
    # A repeated request adds nothing to the queue, and other tenants have separate bounds.
    assert submit(there, first, "poster").status_code == 202
    assert submit(there, other_tenant).status_code == 202


def test_the_image_bound_names_the_parameter_of_the_endpoint(start: Start, keys: KeyFile) -> None:
    key = keys.add("acme", Bounds(images=2)).text
    gateway = start(GATEWAY_KEYS=str(keys.path))
    headers = {"authorization": f"Bearer {key}", "prefer": "respond-async"}

    def post(path: str, body: dict[str, object]) -> httpx2.Response:
        return httpx2.post(gateway.url + path, json=body, headers=headers)

    bodies = {
        ("/v1/images/generations", "n"): IMAGE,
        ("/infer", "num_images"): {"prompt": "a red circle"},
        ("/v1/jobs", "num_images"): {"task": "text_to_image", "prompt": "a red circle"},
    }
    for (path, param), body in bodies.items():
        refused = post(path, {**body, param: 3})
        assert refused.status_code == 400, path
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("bound_exceeded", param)
        assert refused.headers["x-should-retry"] == "false"
        assert post(path, {**body, param: 2}).status_code == 202


# -- log and metrics ------------------------------------------------------------------------------


def test_the_access_log_contains_no_prompts_queries_or_keys(start: Start, keys: KeyFile) -> None:
    new = keys.add("acme", Bounds())
    gateway = start(GATEWAY_KEYS=str(keys.path))
    headers = {"authorization": f"Bearer {new.text}", "prefer": "respond-async"}
    answer = httpx2.post(
        f"{gateway.url}/v1/images/generations?secret-query=1",
        json={**IMAGE, "prompt": "secret-prompt"},
        headers=headers,
    )
    assert answer.status_code == 202
    httpx2.get(f"{gateway.url}/secret-path", headers=headers)
    # A line is written after the response has been sent.
    wait_for(lambda: events_of(gateway).count("http_request") == 2, "the access log is not whole")
    log = gateway.log.read_text()
    assert "secret-" not in log
    assert new.text not in log
    lines = [line for line in lines_of(gateway) if line["event"] == "http_request"]
    logged = next(line for line in lines if line["route"] == "/v1/images/generations")
    assert logged["status"] == 202
    assert logged["key"] == new.id
    assert logged["job"] == answer.headers["x-request-id"]
    assert [line["route"] for line in lines] == ["/v1/images/generations", "unmatched"]


def test_metrics_contain_route_templates_without_ids(start: Start) -> None:
    gateway = start()
    for job_id in ("open0000-t1", "open0000-t2"):
        httpx2.get(f"{gateway.url}/v1/jobs/{job_id}")
    httpx2.get(f"{gateway.url}/no/such/path")
    assert (
        metric(
            gateway,
            "generation_gateway_requests_total",
            method="GET",
            route="/v1/jobs/{job_id}",
            status="404",
        )
        == 2
    )
    assert metric(gateway, "generation_gateway_refused_total", reason="not_found") == 3
    assert metric(gateway, "generation_gateway_ready_condition", condition="bus") == 1
    text = httpx2.get(f"{gateway.url}/metrics").text
    assert "open0000" not in text
    assert "no/such/path" not in text


def test_open_requests_and_streams_are_counted(start: Start) -> None:
    gateway = start()
    job = httpx2.post(
        f"{gateway.url}/v1/jobs", json={"task": "text_to_image", "prompt": "a red circle"}
    ).json()
    with httpx2.stream("GET", gateway.url + job["events_url"]) as stream:
        chunks = stream.iter_raw()  # a reference, because its garbage collection closes the stream
        next(chunks)
        assert metric(gateway, "generation_gateway_streams") == 1
        assert metric(gateway, "generation_gateway_requests_in_flight") == 2  # one is the scrape
    wait_for(lambda: metric(gateway, "generation_gateway_streams") == 0, "the stream does not end")


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[trustme.CA, dict[str, str]]:
    authority = trustme.CA()
    _write(authority, tmp_path)
    return authority, {
        "GATEWAY_TLS_CERT": str(tmp_path / "cert.pem"),
        "GATEWAY_TLS_KEY": str(tmp_path / "key.pem"),
    }


def _write(authority: trustme.CA, folder: Path) -> None:
    issued = authority.issue_cert("127.0.0.1")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    for name, content in (("cert.pem", chain), ("key.pem", issued.private_key_pem.bytes())):
        draft = folder / f"{name}.new"
        draft.write_bytes(content)
        draft.replace(folder / name)


def _trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_a_renewed_certificate_is_used_and_an_unusable_one_ignored(
    start: Start, certificate: tuple[trustme.CA, dict[str, str]], tmp_path: Path
) -> None:
    first, settings = certificate
    gateway = start(ready=False, patch="serve.CERTIFICATE_CHECK_INTERVAL = 0.1", **settings)
    url = gateway.url.replace("http:", "https:")

    def answers(authority: trustme.CA) -> bool:
        try:
            return httpx2.get(f"{url}/readyz", verify=_trusting(authority)).status_code == 200
        except httpx2.TransportError:
            return False

    wait_for(lambda: answers(first), "the gateway does not respond")
    ready = next(line for line in lines_of(gateway) if line["event"] == "gateway_ready")
    assert ready["url"] == url
    second = trustme.CA()
    _write(second, tmp_path)
    wait_for(lambda: answers(second), "the new certificate is not used")
    certificate_alone = second.issue_cert("127.0.0.1").cert_chain_pems[0].bytes()
    for unusable in (b"damaged", certificate_alone):
        times = events_of(gateway).count("certificate_unusable")
        (tmp_path / "cert.pem").write_bytes(unusable)
        wait_for(
            lambda times=times: events_of(gateway).count("certificate_unusable") > times,  # type: ignore[misc]
            "the unusable certificate is not reported",
        )
        assert answers(second)
    third = trustme.CA()
    _write(third, tmp_path)
    wait_for(lambda: answers(third), "the repaired certificate is not used")


def test_an_unusable_certificate_stops_the_start(
    certificate: tuple[trustme.CA, dict[str, str]], tmp_path: Path
) -> None:
    _, settings = certificate
    (tmp_path / "key.pem").write_text("damaged")
    done = consumer("gateway", **settings, GATEWAY_PORT=str(free_ports(1)[0]))
    assert done.returncode == 2
    assert done.stderr.startswith("consumer: GATEWAY_TLS_CERT: ")
    assert done.stderr.count("\n") == 1


# -- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b" " * 2**21, b"{"], ids=["large", "malformed"])
def test_no_body_is_read_without_a_key(start: Start, keys: KeyFile, content: bytes) -> None:
    keys.add("acme", Bounds())
    gateway = start(GATEWAY_KEYS=str(keys.path))
    for path in ("/v1/jobs", "/v1/images/edits", "/infer", "/no/such/path"):
        answer = httpx2.post(
            gateway.url + path, content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
    wait_for(lambda: events_of(gateway).count("http_request") == 4, "the access log is not whole")
    lines = [line for line in lines_of(gateway) if line["event"] == "http_request"]
    assert [line["received"] for line in lines] == [0, 0, 0, 0]


def test_the_total_size_of_request_bodies_is_bounded(start: Start) -> None:
    """A body counts while its request is in progress, here until the client disconnects."""
    gateway = start(GATEWAY_MAX_BODY="40000", GATEWAY_BODIES_BYTES="60000")
    url = f"{gateway.url}/v1/images/generations"
    padding = " " * 35_000
    body = json.dumps(IMAGE) + padding
    headers = {"content-type": "application/json"}

    def post() -> httpx2.Response:
        return httpx2.post(url, content=body, headers=headers, timeout=WITHIN)

    stream_body = json.dumps({**IMAGE, "stream": True}) + padding
    with httpx2.stream("POST", url, content=stream_body, headers=headers, timeout=WITHIN) as stream:
        assert stream.status_code == 200
        refused = post()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "gateway_busy"
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after"]) > 0
        assert metric(gateway, "generation_gateway_refused_total", reason="gateway_busy") == 1
        # A small body fits, because the refused body no longer counts.
        small = httpx2.post(url, json=IMAGE, headers={"prefer": "respond-async"})
        assert small.status_code == 202
    wait_for(lambda: metric(gateway, "generation_gateway_streams") == 0, "the stream does not end")
    answer = httpx2.post(url, content=body, headers={**headers, "prefer": "respond-async"})
    assert answer.status_code == 202


# -- slow clients ---------------------------------------------------------------------------------


def test_a_client_without_complete_headers_is_disconnected(start: Start) -> None:
    gateway = start(patch="serve.HEADERS_WITHIN = 0.3")
    for sent in (b"", b"GET /readyz HTTP/1.1\r\nhost: "):
        with socket.create_connection(("127.0.0.1", gateway.ports["http"]), WITHIN) as client:
            client.sendall(sent)
            assert client.recv(1) == b""


def test_a_stalled_body_returns_408(start: Start) -> None:
    gateway = start(patch="in_flight.BODY_PART_WITHIN = 0.3")
    with socket.create_connection(("127.0.0.1", gateway.ports["http"]), WITHIN) as client:
        client.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"task":'
        )
        answer = client.recv(65_536)
    assert_is_408(answer)


def test_a_slow_body_returns_408(start: Start) -> None:
    """Each part arrives in time, but the body does not end."""
    gateway = start(patch="in_flight.BODY_WITHIN = 0.5")
    until = time.monotonic() + WITHIN
    answer = b""
    with socket.create_connection(("127.0.0.1", gateway.ports["http"])) as client:
        client.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 1000000\r\n\r\n"
        )
        client.settimeout(0.02)
        while not answer and time.monotonic() < until:
            client.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = client.recv(65_536)
    assert_is_408(answer)


def assert_is_408(answer: bytes) -> None:
    head = answer.lower().split(b"\r\n")
    assert head[0].startswith(b"http/1.1 408 ")
    assert b"x-should-retry: true" in head
    assert b"retry-after: 1" in head


LARGE = """
from consumer.gateway import page
page.FILES = {**page.FILES, "large.js": page.StaticFile.of("large.js", bytes(2**24))}
serve.SEND_WITHIN = 0.3
"""
GET_LARGE = b"GET /page/large.js HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        GET_LARGE + b"\r\n",
        GET_LARGE + b"connection: close\r\n\r\n",
        2 * (GET_LARGE + b"\r\n"),
    ],
    ids=["keep-alive", "close", "pipelined"],
)
def test_a_client_that_reads_nothing_is_disconnected(start: Start, sent: bytes) -> None:
    gateway = start(patch=LARGE)
    with socket.create_connection(("127.0.0.1", gateway.ports["http"]), WITHIN) as client:
        client.sendall(sent)
        wait_for(lambda: "http_slow_reader" in events_of(gateway), "the connection is not closed")
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := client.recv(2**20):
                received += len(chunk)
    assert received < 2**24
    wait_for(
        lambda: metric(gateway, "generation_gateway_requests_in_flight") == 1,
        "the request does not end",
    )


class _SlowTransport(asyncio.Transport):
    """A transport with a write buffer size that the test sets."""

    unread = 100_000
    aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


async def test_a_client_that_reads_a_little_stays_connected() -> None:
    transport = _SlowTransport()
    config = uvicorn.Config(FastAPI(), log_config=None)
    protocol = serve._Protocol(config, ServerState(), {})
    protocol.connection_made(transport)
    protocol.pause_writing()
    for _ in range(5):
        protocol._check_reader()
        transport.unread -= 1
    protocol._check_reader()
    protocol.resume_writing()  # the next response fills the buffer again
    transport.unread = 100_000
    protocol.pause_writing()
    protocol._check_reader()
    assert not transport.aborted
    protocol._check_reader()
    assert transport.aborted
    protocol.connection_lost(ConnectionAbortedError())


# -- stop -----------------------------------------------------------------------------------------


def test_an_idle_gateway_stops_at_once(start: Start) -> None:
    gateway = start()
    gateway.signal(signal.SIGTERM)
    assert ended(gateway) == 0
    assert events_of(gateway)[-2:] == ["gateway_draining", "gateway_stopped"]


def test_a_draining_gateway_ends_streams_and_refuses_new_requests(start: Start) -> None:
    """There is no worker, so a waiting request waits until the end of the drain grace."""
    gateway = start(GATEWAY_DRAIN_GRACE="2")
    submit = {"task": "text_to_image", "prompt": "a red circle"}
    job = httpx2.post(f"{gateway.url}/v1/jobs", json=submit).json()
    headers = {"idempotency-key": os.urandom(8).hex()}
    waiting = in_background(
        lambda: httpx2.post(
            f"{gateway.url}/v1/images/generations", json=IMAGE, headers=headers, timeout=WITHIN
        )
    )
    with httpx2.stream("GET", gateway.url + job["events_url"], timeout=WITHIN) as stream:
        chunks = stream.iter_raw()
        next(chunks)
        wait_for(
            lambda: metric(gateway, "generation_gateway_requests_in_flight") == 3,
            "the request did not arrive",
        )
        gateway.signal(signal.SIGTERM)
        # The stream ends at once, and its client resumes it at another gateway.
        assert b"".join(chunks).endswith(b": the gateway stops, connect again\n\n")
    assert httpx2.get(f"{gateway.url}/healthz").status_code == 200
    ready = httpx2.get(f"{gateway.url}/readyz")
    assert (ready.status_code, ready.json()["gateway"]) == (503, "draining")
    refused = httpx2.post(f"{gateway.url}/v1/jobs", json=submit)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "gateway_stopping"
    assert refused.headers["x-should-retry"] == "true"
    # A waiting request gets a response at the end of the drain grace.
    assert waiting().status_code == 503
    assert waiting().json()["error"]["code"] == "gateway_stopping"
    assert ended(gateway) == 0
    assert "Traceback" not in gateway.log_since_start()


def test_a_result_within_the_drain_grace_is_returned(system: DevStack, start: Start) -> None:
    gateway = start(
        **system.environment(), CONSUMER_SUBJECT_ROOT="generation", GATEWAY_DRAIN_GRACE="120"
    )
    waiting = in_background(
        lambda: httpx2.post(
            f"{gateway.url}/v1/images/generations",
            json={**IMAGE, "num_inference_steps": 40},
            timeout=WITHIN,
        )
    )
    wait_for(
        lambda: metric(gateway, "generation_gateway_requests_in_flight") == 2,
        "the request did not arrive",
    )
    gateway.signal(signal.SIGTERM)
    answer = waiting()
    assert answer.status_code == 200
    assert answer.json()["data"][0]["b64_json"]
    assert ended(gateway) == 0


def test_a_second_signal_stops_the_gateway_at_once(start: Start) -> None:
    gateway = start(GATEWAY_DRAIN_GRACE="600")
    with contextlib.suppress(httpx2.TransportError):
        url = f"{gateway.url}/v1/images/generations"
        with httpx2.stream("POST", url, json={**IMAGE, "stream": True}, timeout=WITHIN) as stream:
            gateway.signal(signal.SIGTERM)
            wait_for(lambda: "gateway_draining" in events_of(gateway), "the gateway does not drain")
            gateway.signal(signal.SIGINT)
            stream.read()
    assert ended(gateway) == 0
    assert "gateway_stopped_before_drained" in events_of(gateway)


def test_a_closed_nats_connection_stops_the_gateway(start: Start) -> None:
    closing = """
from consumer.bus import connection
original = connection.connect
async def connect(*arguments, **named):
    import asyncio
    bus = await original(*arguments, **named)
    asyncio.get_running_loop().call_later(1.0, asyncio.ensure_future, bus.client.close())
    return bus
app.connect = connect
"""
    gateway = start(patch=closing)
    assert ended(gateway) == 69
    assert "service_unavailable" in events_of(gateway)
