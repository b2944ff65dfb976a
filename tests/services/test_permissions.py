"""The users of infra/nats/users.conf: each has the permissions for its work and no others."""

import asyncio
import json
import os
import shlex
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import nats
import nkeys
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error

from consumer.app.apply import apply
from consumer.app.check import check
from consumer.app.dead_letter_commands import replay
from consumer.app.queue_commands import create_queue
from consumer.bus.connection import BusUnavailable, connect
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.queue_length import QueueLength
from consumer.devstack import Daemon, DevStack
from consumer.settings import Settings
from generation_client import GenerationClient, RequestCancelled, ServiceUnavailable, submitting
from generation_contracts import (
    ImageToTextStep,
    Subjects,
    Task,
    TextOutput,
    TextToImageRequest,
)
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.queues import QueueInfo
from tests.support.forked import ForkedGateway, ForkedWorker
from tests.support.quick_runner import FOLDER
from tests.support.scene import ROOT, WITHIN

USERS = ROOT / "infra" / "nats" / "users.conf"
ROLES = ("admin", "worker", "endpoints", "publisher", "gateway", "observer")
INBOXES = {role: f"_INBOX_{'sender' if role == 'publisher' else role}" for role in ROLES}
REQUESTS = "GENERATION_REQUESTS_TEXT_TO_IMAGE"


class Installation:
    """Servers with the users, and the settings of their processes.

    Attributes:
        stack: The servers.
        folder: Folder of the seeds and marks.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self.stack = DevStack(folder / "stack", persist=False, nats_config=config)

    def environment(self, role: str, **more: str) -> dict[str, str]:
        """Return the environment of a user's process."""
        return {
            **self.stack.environment(),
            "NATS_NKEY_SEED": str(self.folder / role),
            "NATS_INBOX_PREFIX": INBOXES[role],
            "NATS_ENDPOINTS_NKEY_SEED": str(self.folder / "endpoints"),
            "NATS_ENDPOINTS_INBOX_PREFIX": INBOXES["endpoints"],
            **more,
        }

    def settings(self, role: str, **more: str) -> Settings:
        """Return the settings of a user for code in this process."""
        environment = self.environment(role, **more)
        return Settings(**{name.lower(): value for name, value in environment.items()})

    @asynccontextmanager
    async def client(self, role: str) -> AsyncIterator[tuple[Client, "asyncio.Queue[str]"]]:
        """Open a plain connection of a user; yield it with a queue of permission errors."""
        refused: asyncio.Queue[str] = asyncio.Queue()

        async def record(error: Exception) -> None:
            refused.put_nowait(str(error).lower())

        client = await nats.connect(
            self.stack.nats.url,
            nkeys_seed=str(self.folder / role),
            inbox_prefix=INBOXES[role],
            error_cb=record,
        )
        try:
            yield client, refused
        finally:
            await client.close()

    def generation_client(self) -> GenerationClient:
        """Return the client of a sender."""
        return GenerationClient(
            self.stack.nats.url,
            nkeys_seed=str(self.folder / "publisher"),
            inbox_prefix=INBOXES["publisher"],
        )


@contextmanager
def installed(
    folder: Path, more_config: str = "", *, ack_wait: str = "2", users: str | None = None
) -> Iterator[Installation]:
    """Run servers with the users of users.conf, the streams and the durable consumers."""
    keys: dict[str, str] = {}
    for role in ROLES:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        (folder / role).write_bytes(seed)
        keys[role] = nkeys.from_seed(bytearray(seed)).public_key.decode()
    variables = "".join(f"GENERATION_{role.upper()}_NKEY: {key}\n" for role, key in keys.items())
    servers = Installation(folder, variables + (users or USERS.read_text()) + more_config)
    with servers.stack:
        asyncio.run(apply(servers.settings("admin", consumer_ack_wait=ack_wait)))
        yield servers


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("permissions")) as servers:
        yield servers


@pytest.fixture
def installation_with_ack_subjects_v2(tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path, "feature_flags { js_ack_fc_v2: true }\n") as servers:
        yield servers


def start_worker(
    installation: Installation, task: Task, folder: Path, cause: str = "none", **more: str
) -> Daemon:
    settings = {
        "MODEL_TYPE": str(task),
        "CONSUMER_REPLY_PREFIXES": "_INBOX_sender.,_INBOX_gateway.,_INBOX_admin.,generation.reply.",
        FOLDER: str(folder),
        **more,
    }
    worker = ForkedWorker(
        f"worker-{task}-{cause}",
        installation.environment("worker", **settings),
        log=folder / f"worker-{task}-{cause}.log",
        cause=cause,
    )
    worker.start()
    return worker


@pytest.fixture
def workers(installation: Installation, tmp_path: Path) -> Iterator[Mapping[Task, Daemon]]:
    started = {
        task: start_worker(installation, task, tmp_path, "slow_steps") for task in DEFAULT_QUEUES
    }
    try:
        for worker in started.values():
            worker.wait_ready()
        yield started
    finally:
        for worker in started.values():
            worker.kill()


async def test_senders_and_workers_have_the_permissions_that_they_need(
    installation: Installation, workers: Mapping[Task, Daemon]
) -> None:
    async with asyncio.timeout(WITHIN), installation.generation_client() as client:
        event = await client.text_to_image("a", num_inference_steps=2)
        image = f"s3://{event.outputs[0].bucket}/{event.outputs[0].key}"  # type: ignore[union-attr]
        text = await client.image_to_text("What is it?", [image])
        assert isinstance(text.outputs[0], TextOutput)
        uploaded = await client.upload(await client.download(event.outputs[0]))  # type: ignore[arg-type]
        assert uploaded.key.startswith("uploads/")
        again = await client.image_to_text("What is it?", uploaded)
        assert again.outputs == text.outputs
        await client.text_to_image(
            "a",
            request_id="chain",
            num_inference_steps=2,
            then=[ImageToTextStep(task="image_to_text", prompt="b")],
        )
        end = await client.result(Task.IMAGE_TO_TEXT, "chain-2")
        assert end.type == "generation.v1.succeeded"
        begun = asyncio.Event()
        running = asyncio.ensure_future(
            client.text_to_image(
                "a",
                request_id="stopped",
                num_inference_steps=100,
                on_event=lambda _: begun.set(),
            )
        )
        await begun.wait()
        assert (await client.cancel("stopped")).status == "stopping"
        with pytest.raises(RequestCancelled):
            await running
    for worker in workers.values():
        assert "ermissions violation" not in worker.log_since_start()


async def test_calls_and_dead_letters_need_no_further_permissions(
    installation: Installation, workers: Mapping[Task, Daemon]
) -> None:
    async with installation.client("publisher") as (client, refused):
        answer = await client.request(
            "generation.call.text_to_image", b'{"prompt":"a","steps":2}', timeout=WITHIN
        )
        assert json.loads(answer.data)["type"] == "generation.v1.succeeded"
        await client.jetstream().publish("generation.request.text_to_image.bad", b"{}")
        results = await client.subscribe("generation.result.text_to_image.bad")
        async with installation.generation_client() as sender, asyncio.timeout(WITHIN):
            event = await sender.result(Task.TEXT_TO_IMAGE, "bad")
        assert event.type == "generation.v1.failed"
        await results.unsubscribe()
        assert refused.empty()
    await settled(installation)  # a replay is refused while the request is in the queue
    assert await replay(installation.settings("admin"), ("id:bad",)) == 0
    for worker in workers.values():
        assert "ermissions violation" not in worker.log_since_start()


async def test_a_publisher_can_read_the_length_of_a_queue_but_no_ids(
    installation: Installation,
) -> None:
    async with installation.client("admin") as (admin, _):
        await admin.jetstream().purge_stream(REQUESTS)  # a test before may have replayed a request
    bus = await connect(installation.settings("publisher"), name="sender", within=WITHIN)
    try:
        queue = QueueLength(bus, REQUESTS, "text_to_image")
        ids = [f"secret-{number}" for number in range(3)]
        for request_id in ids:
            await bus.jetstream.publish(f"generation.request.text_to_image.{request_id}", b"{}")
        assert await queue.before() == len(ids) - 1
        subject = f"$JS.API.CONSUMER.INFO.{REQUESTS}.text_to_image"
        assert b"secret" not in await bus.request(subject, b"", within=WITHIN)
    finally:
        await bus.close()
    async with installation.client("admin") as (admin, _):
        await admin.jetstream().purge_stream(REQUESTS)


async def test_the_length_of_a_queue_needs_the_permission(installation: Installation) -> None:
    bus = await connect(installation.settings("endpoints"), name="endpoints", within=WITHIN)
    try:
        with pytest.raises(BusUnavailable, match="length of the queue is unknown: TimeoutError"):
            await QueueLength(bus, REQUESTS, "text_to_image").before()
    finally:
        await bus.close()


async def test_a_gateway_has_the_permissions_that_it_needs(
    installation: Installation, workers: Mapping[Task, Daemon], tmp_path: Path
) -> None:
    gateway = ForkedGateway("gateway", installation.environment("gateway"), log=tmp_path / "log")
    await asyncio.to_thread(gateway.start)
    try:
        await asyncio.to_thread(gateway.wait_ready)
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=WITHIN) as client:
            models = (await client.get("/v1/models")).json()["data"]
            assert {task for model in models for task in model["tasks"]} == set(DEFAULT_QUEUES)
            drawing = {"prompt": "a", "num_inference_steps": 2}
            for _ in range(2):
                drawn = await client.post(
                    "/v1/images/generations", json=drawing, headers={"idempotency-key": "one"}
                )
                assert drawn.status_code == 200, drawn.text
            long = {"task": "text_to_image", "prompt": "a", "num_inference_steps": 200}
            jobs = [(await client.post("/v1/jobs", json=long)).json() for _ in range(2)]
            assert (await client.get(jobs[1]["status_url"])).json()["position"] is not None
            assert (await client.get("/v1/queue")).json()["tasks"]
            listed = (await client.get("/v1/jobs")).json()["data"]
            assert {job["id"] for job in jobs} < {job["id"] for job in listed}
            for job in reversed(jobs):
                cancelled = await client.delete(job["cancel_url"])
                assert cancelled.status_code in {200, 202}, cancelled.text
                events = (await client.get(job["events_url"])).text
                assert "event: cancelled" in events
    finally:
        await asyncio.to_thread(gateway.stop)
    processes = [gateway, *workers.values()]
    assert not [each.name for each in processes if "ermissions violation" in each.log_since_start()]
    assert "warning" not in {
        line["level"]
        for line in map(json.loads, gateway.log_since_start().splitlines())
        if line["event"] != "gateway_without_keys"
    }


@pytest.fixture
def installation_of_an_earlier_version(tmp_path: Path) -> Iterator[Installation]:
    users = USERS.read_text().replace('"$JS.API.STREAM.LIST"', "")
    with installed(tmp_path, users=users) as servers:
        yield servers


async def test_without_the_permission_to_list_streams_the_default_queues_work(
    installation_of_an_earlier_version: Installation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installation = installation_of_an_earlier_version
    worker = start_worker(installation, Task.TEXT_TO_IMAGE, tmp_path)
    bus = await connect(installation.settings("gateway"), name="gateway", within=WITHIN)
    try:
        await asyncio.to_thread(worker.wait_ready)
        async with asyncio.timeout(WITHIN), installation.generation_client() as client:
            assert (await client.text_to_image("a", num_inference_steps=2)).queue is None
            assert (await client.cancel("none")).status == "unknown"
            with pytest.raises(
                ServiceUnavailable, match=r"may not publish to \$JS.API.STREAM.LIST"
            ):
                await client.queues()
        directory = QueueDirectory(bus, Subjects())
        assert list(await directory.queues()) == list(DEFAULT_QUEUES)
        requests: list[str] = []
        monkeypatch.setattr(bus, "request", lambda subject, *_, **__: requests.append(subject))
        directory.expire()
        assert list(await directory.queues()) == list(DEFAULT_QUEUES)
        assert requests == []  # the refused list is not read again for a minute
    finally:
        worker.kill()
        await bus.close()


def with_queue(users: str) -> str:
    """Add the permissions for a queue with the command of the docs, for a queue named `sdxl`."""
    page = (ROOT / "docs" / "queues.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("$ sed -E "))
    script = shlex.split(command)[3]
    done = subprocess.run(
        ["sed", "-E", script], input=users, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def installation_with_queue(tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path, users=with_queue(USERS.read_text())) as servers:
        yield servers


async def test_another_queue_needs_the_permissions_of_the_docs(
    installation_with_queue: Installation, tmp_path: Path
) -> None:
    installation = installation_with_queue
    queue = QueueInfo("sdxl", Task.TEXT_TO_IMAGE, "org/sdxl")
    await create_queue(installation.settings("admin", consumer_ack_wait="2"), queue)
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    own = start_worker(installation, Task.TEXT_TO_IMAGE, tmp_path / "own", CONSUMER_QUEUE="sdxl")
    other = start_worker(installation, Task.IMAGE_TO_TEXT, tmp_path / "other")
    gateway = ForkedGateway("g", installation.environment("gateway"), log=tmp_path / "log")
    processes = (own, other, gateway)
    try:
        await asyncio.to_thread(gateway.start)
        for process in processes:
            await asyncio.to_thread(process.wait_ready)
        async with asyncio.timeout(WITHIN), installation.generation_client() as client:
            event = await client.text_to_image("a", model="org/sdxl", num_inference_steps=2)
            assert event.queue == "sdxl"
            own.stop()
            waiting = await client.submit(TextToImageRequest(prompt="a"), queue="sdxl")
            assert (await client.cancel(waiting)).status == "cancelled"
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=WITHIN) as http:
            job = {"task": "text_to_image", "prompt": "a", "model": "sdxl"}
            submitted = (await http.post("/v1/jobs", json=job)).json()
            assert (submitted["queue"], submitted["position"]) == ("sdxl", 0)
            assert len((await http.get("/v1/queue")).json()["queues"]) == 3
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        assert "ermissions violation" not in process.log_since_start()


async def test_a_worker_can_take_over_the_request_of_a_killed_worker(
    installation: Installation, tmp_path: Path
) -> None:
    """The permissions cover the lease guard and the reads of attempt marks."""
    task = Task.TEXT_TO_IMAGE
    (tmp_path / "die").touch()
    dying = start_worker(installation, task, tmp_path, "killed_in_run")
    async with installation.generation_client() as client, asyncio.timeout(WITHIN):
        await asyncio.to_thread(dying.wait_ready)
        await logged(dying, "lease_guard_connected")
        running = asyncio.ensure_future(client.text_to_image("a"))
        while dying.alive:
            await asyncio.wait({running}, timeout=0.05)
        successor = start_worker(installation, task, tmp_path)
        try:
            assert (await running).attempt == 2
            await logged(successor, "lease_guard_connected")
            await asyncio.to_thread(successor.stop)
        finally:
            successor.kill()
    for worker in (dying, successor):
        assert "ermissions violation" not in worker.log_since_start()


async def test_a_worker_can_acknowledge_with_ack_subjects_of_version_2(
    installation_with_ack_subjects_v2: Installation, tmp_path: Path
) -> None:
    installation = installation_with_ack_subjects_v2
    worker = start_worker(installation, Task.TEXT_TO_IMAGE, tmp_path)
    try:
        async with installation.generation_client() as client, asyncio.timeout(WITHIN):
            await asyncio.to_thread(worker.wait_ready)
            await client.text_to_image("a")
        await settled(installation)
    finally:
        worker.kill()
    assert "ermissions violation" not in worker.log_since_start()


async def settled(installation: Installation) -> None:
    """Wait until the queue of text_to_image is empty."""
    async with installation.client("observer") as (client, _), asyncio.timeout(WITHIN):
        jetstream = client.jetstream()
        while (await jetstream.stream_info(REQUESTS)).state.messages:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def logged(worker: Daemon, text: str) -> None:
    """Wait until a worker has logged a text."""
    while text not in worker.log_since_start():  # noqa: ASYNC110 - a file has no events
        await asyncio.sleep(0.01)


async def test_check_passes_with_the_permissions_of_a_worker(installation: Installation) -> None:
    found: list[str] = []
    settings = installation.settings("worker", model_type="text_to_image")
    code = await check(settings, lambda finding: found.append(finding.text), model=False)
    assert code == 0, found


async def test_only_the_admin_can_apply(installation: Installation) -> None:
    for role in ("worker", "publisher", "gateway", "observer"):
        with pytest.raises(BusUnavailable, match=r"ermissions [Vv]iolation"):
            await apply(installation.settings(role, nats_replicas="1", consumer_ack_wait="7"))


# Forbidden publications. If allowed, an empty body would perform the operation.
FORBIDDEN_PUBLICATIONS = [
    *(
        (role, subject)
        for role in ("worker", "endpoints", "publisher", "gateway", "observer")
        for subject in (
            f"$JS.API.STREAM.DELETE.{REQUESTS}",
            f"$JS.API.STREAM.PURGE.{REQUESTS}",
            f"$JS.API.STREAM.UPDATE.{REQUESTS}",
            "$JS.API.STREAM.CREATE.OTHER",
            "$JS.API.STREAM.DELETE.GENERATION_RESULTS",
            "$JS.API.STREAM.PURGE.GENERATION_RESULTS",
            "$JS.API.STREAM.MSG.DELETE.GENERATION_DEAD_LETTERS",
            f"$JS.API.CONSUMER.DELETE.{REQUESTS}.text_to_image",
            f"$JS.API.CONSUMER.CREATE.{REQUESTS}.mine",
            f"$JS.API.CONSUMER.PAUSE.{REQUESTS}.text_to_image",
            # A reply to these has no body, which is a complete request to PURGE and DELETE.
            "$JS.API.DIRECT.GET.GENERATION_RESULTS",
            "$JS.API.DIRECT.GET.GENERATION_RESULTS.generation.result.text_to_image.x",
            f"$JS.API.DIRECT.GET.{REQUESTS}",
            "$JS.API.DIRECT.GET.GENERATION_DEAD_LETTERS",
            "$JS.API.DIRECT.GET.GENERATION_RETRIES",
            "_INBOX.other",
            "$SYS.REQ.SERVER.PING",
        )
    ),
    *(
        (role, subject)
        for role in ("endpoints", "publisher", "gateway", "observer")
        for subject in (
            "generation.result.text_to_image.x",
            "generation.dead.text_to_image",
            "generation.released.text_to_image.1",
            "generation.withdrawn.text_to_image.1",
            "generation.retry.text_to_image.x",
            "generation.progress.text_to_image.x",
            "generation.interrupt.x",
            "$JS.API.STREAM.MSG.DELETE.GENERATION_RESULTS",
            f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.text_to_image",
            f"$JS.ACK.{REQUESTS}.text_to_image.1.1.1.1.1",
            f"$JS.ACK._.hash.{REQUESTS}.text_to_image.1.1.1.1.1",
        )
    ),
    *(
        (role, "$JS.API.STREAM.MSG.GET.GENERATION_RETRIES")
        for role in ("endpoints", "publisher", "observer")
    ),
    ("worker", "generation.call.text_to_image"),
    ("worker", "generation.cancel.x"),
    ("worker", "generation.upload"),
    ("worker", "$SRV.PING.generation"),
    ("worker", "_INBOX_worker.x"),
    ("worker", "_INBOX_endpoints.x"),
    ("endpoints", "generation.call.text_to_image"),
    ("endpoints", "generation.cancel.x"),
    ("endpoints", "generation.upload"),
    ("endpoints", "generation.request.text_to_image"),
    ("endpoints", "generation.request.other.x"),
    ("endpoints", "$JS.API.STREAM.MSG.GET.GENERATION_RESULTS"),
    ("endpoints", "$JS.API.STREAM.INFO.GENERATION_RESULTS"),
    ("endpoints", "$JS.API.STREAM.LIST"),
    ("endpoints", "$SRV.PING.other.x"),
    ("publisher", "generation.request.other"),
    ("publisher", "_INBOX_worker.x"),
    ("publisher", "_INBOX_endpoints.x"),
    ("gateway", "generation.request.text_to_image"),
    ("gateway", "generation.request.other.x"),
    ("gateway", "generation.call.text_to_image"),
    ("gateway", "generation.upload"),
    ("gateway", "generation.reply.x"),
    ("gateway", "_INBOX_worker.x"),
    ("gateway", "_INBOX_endpoints.x"),
    ("gateway", "_INBOX_sender.x"),
    ("gateway", "$SRV.STATS.generation"),
    ("gateway", "$JS.API.STREAM.INFO.GENERATION_DEAD_LETTERS"),
    ("gateway", "$JS.API.STREAM.MSG.GET.GENERATION_DEAD_LETTERS"),
    ("gateway", "$JS.API.STREAM.MSG.GET.GENERATION_RELEASES"),
    (
        "gateway",
        f"$JS.API.STREAM.MSG.DELETE.{REQUESTS}",
    ),
    ("gateway", "$JS.API.STREAM.MSG.DELETE.GENERATION_RETRIES"),
    ("observer", "generation.request.text_to_image"),
    ("observer", "generation.call.text_to_image"),
    ("observer", "generation.cancel.x"),
    ("observer", "generation.upload"),
    ("observer", f"$JS.API.STREAM.MSG.GET.{REQUESTS}"),
]

FORBIDDEN_SUBSCRIPTIONS = [
    *(
        (role, subject)
        for role in ("worker", "endpoints", "publisher", "gateway", "observer")
        for subject in ("generation.request.>", ">", "_INBOX.>", "$JS.ACK.>", "$JS.API.>")
    ),
    *(
        (role, subject)
        for role in ("worker", "publisher", "gateway", "observer")
        for subject in (
            "generation.call.*",
            "generation.cancel.*",
            "generation.upload",
            "generation.interrupt.*",
            "$SRV.>",
            "_INBOX_endpoints.>",
        )
    ),
    ("worker", "_INBOX_sender.>"),
    ("endpoints", "_INBOX_sender.>"),
    ("endpoints", "_INBOX_worker.>"),
    ("endpoints", "generation.result.>"),
    ("publisher", "_INBOX_worker.>"),
    ("publisher", "_INBOX_gateway.>"),
    ("gateway", "_INBOX_worker.>"),
    ("gateway", "_INBOX_sender.>"),
    ("gateway", "generation.reply.>"),
    ("observer", "_INBOX_sender.>"),
]


async def refusals(
    installation: Installation,
    role: str,
    operation: Callable[[Client, str], Awaitable[object]],
    subjects: Sequence[str],
) -> list[str]:
    """Return the server's permission errors for an operation on each subject, in order."""
    async with installation.client(role) as (client, refused), asyncio.timeout(WITHIN):
        errors = []
        for subject in subjects:
            await operation(client, subject)
            errors.append(await refused.get())
        return errors


def of_role(role: str, table: Sequence[tuple[str, str]]) -> list[str]:
    """Return the subjects of a user in a table."""
    return [subject for each, subject in table if each == role]


@pytest.mark.parametrize("role", ROLES[1:])
async def test_forbidden_publications_are_refused(installation: Installation, role: str) -> None:
    subjects = of_role(role, FORBIDDEN_PUBLICATIONS)
    errors = await refusals(
        installation, role, lambda client, to: client.publish(to, b""), subjects
    )
    expected = [f'permissions violation for publish to "{to.lower()}"' for to in subjects]
    assert [one.removeprefix("nats: ") for one in errors] == expected


@pytest.mark.parametrize("role", ROLES[1:])
async def test_forbidden_subscriptions_are_refused(installation: Installation, role: str) -> None:
    subjects = of_role(role, FORBIDDEN_SUBSCRIPTIONS)
    errors = await refusals(installation, role, lambda client, of: client.subscribe(of), subjects)
    expected = [f'permissions violation for subscription to "{of.lower()}"' for of in subjects]
    assert [one.removeprefix("nats: ") for one in errors] == expected


def reply_subjects(*, api: bool) -> list[str]:
    """Return reply subjects forbidden for senders: of the daemon, or of the JetStream API."""
    streams = ("GENERATION_RESULTS", REQUESTS, "GENERATION_RELEASES")
    verbs = ("PURGE", "DELETE", "MSG.DELETE", "UPDATE", "LEADER.STEPDOWN")
    if api:
        stream_subjects = [
            f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs for stream in streams
        ]
        consumer_verbs = ("DELETE", "PAUSE", "CREATE", "RESET", "UNPIN")
        durable = f"{REQUESTS}.text_to_image"
        return [
            *stream_subjects,
            *(f"$JS.API.CONSUMER.{verb}.{durable}" for verb in consumer_verbs),
        ]
    return [
        f"generation.{rest}"
        for rest in (
            "result.text_to_image.other",
            "dead.text_to_image",
            "released.text_to_image.1-1.1.released",
            "withdrawn.text_to_image.1-1",
            "retry.text_to_image.other",
            "interrupt.other",
            "request.text_to_image.other",
            "progress.text_to_image.other",
        )
    ]


async def test_a_worker_does_not_reply_to_subjects_that_its_sender_must_not_publish_to(
    installation: Installation, tmp_path: Path
) -> None:
    worker = start_worker(installation, Task.TEXT_TO_IMAGE, tmp_path)
    arrived: list[str] = []

    async def note(message: Msg) -> None:
        arrived.append(f"{message.subject}: {message.data.decode()}")

    try:
        await asyncio.to_thread(worker.wait_ready)
        async with (
            asyncio.timeout(WITHIN),
            installation.client("admin") as (admin, _),
            installation.client("publisher") as (sender, _),
        ):
            forbidden = [*reply_subjects(api=False), *reply_subjects(api=True), "$SYS.REQ.X"]
            for subject in forbidden:
                await admin.subscribe(subject, cb=note)
            await admin.flush()
            for reply in (*forbidden, "_INBOX_other.x"):
                body = b'{"prompt":"a","request_id":"other"}'
                await sender.publish("generation.call.text_to_image", body, reply=reply)
                await sender.publish("generation.call.text_to_image", b"{", reply=reply)
                await sender.publish("generation.cancel.other", b"", reply=reply)
                await sender.publish("generation.cancel.no~id", b"", reply=reply)
                await sender.publish("$SRV.PING.generation", b"", reply=reply)
                await sender.publish("$SRV.INFO.generation", b"", reply=reply)
                await admin.publish("$SRV.STATS.generation", b"", reply=reply)
                await admin.publish("generation.interrupt.mine", b"", reply=reply)
            # The worker replies to valid messages after all of these.
            await sender.request("generation.call.text_to_image", b"{", timeout=WITHIN)
            await sender.request("generation.cancel.no~id", b"", timeout=WITHIN)
            for subject in ("$SRV.PING.generation", "$SRV.STATS.generation"):
                await admin.request(subject, timeout=WITHIN)
            await admin.flush()
        assert arrived == []
    finally:
        worker.kill()
    # The worker did not publish at all. The permissions are an additional protection.
    assert "ermissions violation" not in worker.log_since_start()


async def test_replies_of_the_server_do_not_purge_or_delete(
    installation: Installation,
) -> None:
    """The server replies to any reply subject without a permission check."""
    messages = {
        "$JS.API.DIRECT.GET.GENERATION_RESULTS": [b'{"seq":999}', b""],
        "$JS.API.DIRECT.GET.GENERATION_RESULTS.generation.result.text_to_image.none": [b""],
        "$JS.API.STREAM.MSG.GET.GENERATION_RESULTS": [
            b'{"last_by_subj":"generation.result.text_to_image.none"}',
            b'{"last_by_subj":"generation.result.text_to_image.kept"}',
            b"",
        ],
        f"$JS.API.CONSUMER.INFO.{REQUESTS}.text_to_image": [b""],
        "$JS.API.STREAM.LIST": [b"", b'{"subject":"generation.none"}'],
        "generation.request.text_to_image.kept": [b"{}"],
        "generation.request.image_to_text": [b"{}"],
    }
    headers = [None, {"Nats-Expected-Last-Sequence": "999999"}]  # an error instead of a PubAck
    async with (
        asyncio.timeout(WITHIN),
        installation.client("admin") as (admin, _),
        installation.client("publisher") as (sender, _),
    ):
        jetstream = admin.jetstream()

        async def message_counts() -> dict[str, int]:
            infos = await jetstream.streams_info()
            return {str(info.config.name): info.state.messages for info in infos}

        await jetstream.publish("generation.result.text_to_image.kept", b"{}")
        before = await message_counts()
        durable = await jetstream.consumer_info(REQUESTS, "text_to_image")
        for reply in reply_subjects(api=True):
            for subject, bodies in messages.items():
                for body in bodies:
                    for header in headers:
                        await sender.publish(subject, body, reply=reply, headers=header)
        # Each stream stores messages in order, so these confirmations cover all earlier messages.
        for subject in ("text_to_image.kept", "image_to_text"):
            await sender.request(f"generation.request.{subject}", b"{}", timeout=WITHIN)
        after = await message_counts()
        # Only the request streams have new messages.
        requests = {name for name in before if "_REQUESTS_" in name}
        assert after.keys() == before.keys()
        assert all(after[name] > before[name] for name in requests)
        assert {n: after[n] for n in before if n not in requests} == {
            n: before[n] for n in before if n not in requests
        }
        found = await jetstream.consumer_info(REQUESTS, "text_to_image")
        assert (found.config, found.created) == (durable.config, durable.created)
        for name in requests:
            await jetstream.purge_stream(name)


ORDERS = [  # headers with an effect on the server, and its error for them in a request
    ({"Nats-Rollup": "all"}, "rollup not permitted"),
    ({"Nats-Rollup": "sub"}, "rollup not permitted"),
    ({"Nats-TTL": "1s"}, "per-message TTL is disabled"),
    (
        {
            "Nats-Schedule": "@at 2020-01-01T00:00:00Z",
            "Nats-Schedule-Target": "generation.result.text_to_image.x",
        },
        "message schedules is disabled",
    ),
    ({"Nats-Incr": "1"}, "message counters is disabled"),
    ({"Nats-Batch-Id": "x", "Nats-Batch-Sequence": "1"}, "atomic publish is disabled"),
    ({"Nats-Stream-Source": "x"}, "message stream source header is not allowed"),
]


async def test_headers_of_a_publisher_do_not_affect_other_messages(
    installation: Installation,
) -> None:
    async with (
        asyncio.timeout(WITHIN),
        installation.client("publisher") as (sender, refused),
        installation.client("observer") as (observer, _),
    ):
        before = (await observer.jetstream().stream_info(REQUESTS)).state.last_seq
        for headers, description in ORDERS:
            answer = await sender.request(
                "generation.request.text_to_image.x", b"{}", timeout=WITHIN, headers=headers
            )
            assert json.loads(answer.data)["error"]["description"] == description
        # The server drops a message whose trace destination is forbidden for the sender.
        for target in (*reply_subjects(api=True), "generation.result.text_to_image.x"):
            for subject in ("generation.request.text_to_image.x", "generation.call.text_to_image"):
                await sender.publish(subject, b"{}", headers={"Nats-Trace-Dest": target})
                error = await refused.get()
                assert error == f'nats: permissions violation for publish to "{target.lower()}"'
        assert (await observer.jetstream().stream_info(REQUESTS)).state.last_seq == before


async def test_a_wrong_inbox_prefix_is_named_with_its_setting(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "PUBLISH_TIMEOUT", 0.5)
    client = GenerationClient(
        installation.stack.nats.url,
        nkeys_seed=str(installation.folder / "publisher"),
        inbox_prefix="_INBOX",
    )
    async with client:
        with pytest.raises(
            ServiceUnavailable, match=r"may not subscribe to _INBOX\.>; set NATS_INBOX_PREFIX"
        ):
            await client.text_to_image("a")


async def test_an_observer_can_read_the_state_of_streams(installation: Installation) -> None:
    async with installation.client("observer") as (client, refused):
        jetstream: Any = client.jetstream()
        assert (await jetstream.stream_info(REQUESTS)).config.name == REQUESTS
        assert (await jetstream.consumer_info(REQUESTS, "text_to_image")).num_pending is not None
        await client.subscribe("generation.result.>")
        await client.subscribe("$JS.EVENT.ADVISORY.>")
        await client.flush()
        assert refused.empty()


async def test_a_connection_without_a_key_is_refused(installation: Installation) -> None:
    settings = Settings(nats_url=installation.stack.nats.url)
    async with AsyncExitStack():
        with pytest.raises(BusUnavailable, match="credentials are refused"):
            await connect(settings, name="test", within=2.0)
    with pytest.raises(Error):
        await nats.connect(
            installation.stack.nats.url, allow_reconnect=False, max_reconnect_attempts=0
        )
