"""The users of infra/nats/users.conf: each can do its work, and nothing of what it must not."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import nkeys
import pytest
from nats.aio.client import Client
from nats.errors import Error

from consumer.apply import apply
from consumer.bus.connection import BusUnavailable, connect
from consumer.check import check
from consumer.dead_letters import replay
from consumer.devstack import Daemon, DevStack
from consumer.settings import Settings
from generation_client import GenerationClient, RequestCancelled
from generation_contracts import ImageToTextStep, Task, TextOutput
from tests.faults.quick_runner import FOLDER
from tests.faults.scene import ROOT, WITHIN

USERS = ROOT / "infra" / "nats" / "users.conf"
ROLES = ("admin", "worker", "publisher", "observer")
INBOXES = {role: f"_INBOX_{'sender' if role == 'publisher' else role}" for role in ROLES}
REQUESTS = "GENERATION_REQUESTS_TEXT_TO_IMAGE"


class Installation:
    """Servers that know the four users, and their settings.

    Attributes:
        stack: The servers.
        folder: Where seeds and marks are.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self.stack = DevStack(folder / "stack", persist=False, nats_config=config)

    def environment(self, role: str, **more: str) -> dict[str, str]:
        """The settings of a user's process."""
        return {
            **self.stack.environment(),
            "NATS_NKEY_SEED": str(self.folder / role),
            "NATS_INBOX_PREFIX": INBOXES[role],
            **more,
        }

    def settings(self, role: str, **more: str) -> Settings:
        """The same, for what runs in this process."""
        environment = self.environment(role, **more)
        return Settings(**{name.lower(): value for name, value in environment.items()})

    @asynccontextmanager
    async def client(self, role: str) -> AsyncIterator[tuple[Client, "asyncio.Queue[str]"]]:
        """A plain connection of a user, and what the server refuses it."""
        refused: asyncio.Queue[str] = asyncio.Queue()

        async def hear(error: Exception) -> None:
            refused.put_nowait(str(error).lower())

        client = await nats.connect(
            self.stack.nats.url,
            nkeys_seed=str(self.folder / role),
            inbox_prefix=INBOXES[role],
            error_cb=hear,
        )
        try:
            yield client, refused
        finally:
            await client.close()

    def generation_client(self) -> GenerationClient:
        """What a sender uses."""
        return GenerationClient(
            self.stack.nats.url,
            nkeys_seed=str(self.folder / "publisher"),
            inbox_prefix=INBOXES["publisher"],
        )


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("permissions")
    keys: dict[str, str] = {}
    for role in ROLES:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        (folder / role).write_bytes(seed)
        keys[role] = nkeys.from_seed(bytearray(seed)).public_key.decode()
    variables = "".join(f"GENERATION_{role.upper()}_NKEY: {key}\n" for role, key in keys.items())
    made = Installation(folder, variables + USERS.read_text())
    with made.stack:
        asyncio.run(apply(made.settings("admin", consumer_ack_wait="2")))
        yield made


def start_worker(
    installation: Installation, task: Task, folder: Path, cause: str = "none"
) -> Daemon:
    settings = {
        "MODEL_TYPE": str(task),
        "CONSUMER_REPLY_PREFIXES": "_INBOX_sender.,generation.reply.",
        FOLDER: str(folder),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'contracts'}",
    }
    worker = Daemon(
        f"worker-{task}-{cause}",
        installation.environment("worker", **settings),
        log=folder / f"worker-{task}-{cause}.log",
    )
    worker.argv = (sys.executable, "-P", "-m", "tests.faults.worker", cause)
    worker.start()
    return worker


@pytest.fixture
def workers(installation: Installation, tmp_path: Path) -> Iterator[Mapping[Task, Daemon]]:
    started = {task: start_worker(installation, task, tmp_path, "slow_steps") for task in Task}
    try:
        for worker in started.values():
            worker.wait_ready()
        yield started
    finally:
        for worker in started.values():
            worker.kill()


async def test_everything_that_senders_and_workers_do_is_allowed(
    installation: Installation, workers: Mapping[Task, Daemon]
) -> None:
    async with asyncio.timeout(WITHIN), installation.generation_client() as client:
        event = await client.text_to_image("a", num_inference_steps=2)
        picture = f"s3://{event.outputs[0].bucket}/{event.outputs[0].key}"  # type: ignore[union-attr]
        text = await client.image_to_text("What is it?", [picture])
        assert isinstance(text.outputs[0], TextOutput)
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


async def test_a_call_and_a_dead_letter(
    installation: Installation, workers: Mapping[Task, Daemon]
) -> None:
    async with installation.client("publisher") as (client, refused):
        answer = await client.request(
            "generation.call.text_to_image", b'{"prompt":"a","steps":2}', timeout=WITHIN
        )
        assert json.loads(answer.data)["type"] == "generation.v1.succeeded"
        await client.jetstream().publish("generation.request.text_to_image.bad", b"{}")
        results = await client.subscribe("generation.result.text_to_image.bad")
        async with installation.generation_client() as asking, asyncio.timeout(WITHIN):
            event = await asking.result(Task.TEXT_TO_IMAGE, "bad")
        assert event.type == "generation.v1.failed"
        await results.unsubscribe()
        assert refused.empty()
    await settled(installation)  # else it is still in the queue, and a replay is refused
    assert await replay(installation.settings("admin"), ("id:bad",)) == 0
    for worker in workers.values():
        assert "ermissions violation" not in worker.log_since_start()


async def test_a_worker_that_is_killed_has_a_successor(
    installation: Installation, tmp_path: Path
) -> None:
    """Its standby, and its successor's look at the notes, are allowed as well."""
    task = Task.TEXT_TO_IMAGE
    (tmp_path / "die").touch()
    dying = start_worker(installation, task, tmp_path, "killed_in_run")
    async with installation.generation_client() as client, asyncio.timeout(WITHIN):
        await asyncio.to_thread(dying.wait_ready)
        await logged(dying, "standby_connected")
        running = asyncio.ensure_future(client.text_to_image("a"))
        while dying.alive:
            await asyncio.wait({running}, timeout=0.05)
        successor = start_worker(installation, task, tmp_path)
        try:
            assert (await running).attempt == 2
            await logged(successor, "standby_connected")
            await asyncio.to_thread(successor.stop)
        finally:
            successor.kill()
    for worker in (dying, successor):
        assert "ermissions violation" not in worker.log_since_start()


async def settled(installation: Installation) -> None:
    """Return once no request of text_to_image is left."""
    async with installation.client("observer") as (client, _), asyncio.timeout(WITHIN):
        jetstream = client.jetstream()
        while (await jetstream.stream_info(REQUESTS)).state.messages:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def logged(worker: Daemon, text: str) -> None:
    """Return once a worker has logged a text."""
    while text not in worker.log_since_start():  # noqa: ASYNC110 - a file announces nothing
        await asyncio.sleep(0.01)


async def test_check_passes_with_what_a_worker_may(installation: Installation) -> None:
    found: list[str] = []
    settings = installation.settings("worker", model_type="text_to_image")
    code = await check(settings, lambda finding: found.append(finding.said), model=False)
    assert code == 0, found


async def test_apply_is_the_admins(installation: Installation) -> None:
    for role in ("worker", "publisher", "observer"):
        with pytest.raises(BusUnavailable, match=r"ermissions [Vv]iolation"):
            await apply(installation.settings(role, nats_replicas="1", consumer_ack_wait="7"))


# What each must not do; an empty body would do it, where it was allowed.
FORBIDDEN = [
    *(
        (role, subject)
        for role in ("worker", "publisher", "observer")
        for subject in (
            f"$JS.API.STREAM.DELETE.{REQUESTS}",
            f"$JS.API.STREAM.PURGE.{REQUESTS}",
            f"$JS.API.STREAM.UPDATE.{REQUESTS}",
            "$JS.API.STREAM.CREATE.OTHER",
            "$JS.API.STREAM.DELETE.GENERATION_RESULTS",
            "$JS.API.STREAM.MSG.DELETE.GENERATION_RESULTS",
            "$JS.API.STREAM.MSG.DELETE.GENERATION_DEAD_LETTERS",
            f"$JS.API.CONSUMER.DELETE.{REQUESTS}.text_to_image",
            f"$JS.API.CONSUMER.CREATE.{REQUESTS}.mine",
            f"$JS.API.CONSUMER.PAUSE.{REQUESTS}.text_to_image",
            "_INBOX.somebody",
            "$SYS.REQ.SERVER.PING",
        )
    ),
    ("worker", "generation.call.text_to_image"),
    ("worker", "generation.cancel.x"),
    ("publisher", "generation.result.text_to_image.x"),
    ("publisher", "generation.dead.text_to_image"),
    ("publisher", "generation.progress.text_to_image.x"),
    ("publisher", "generation.interrupt.x"),
    ("publisher", "generation.withdrawn.text_to_image.1"),
    ("publisher", "generation.request.other"),
    ("publisher", f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.text_to_image"),
    ("publisher", f"$JS.ACK.{REQUESTS}.text_to_image.1.1.1.1.1"),
    ("publisher", "_INBOX_worker.x"),
    ("observer", "generation.request.text_to_image"),
    ("observer", "generation.call.text_to_image"),
    ("observer", "generation.cancel.x"),
    ("observer", "generation.result.text_to_image.x"),
    ("observer", f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.text_to_image"),
    ("observer", f"$JS.API.STREAM.MSG.GET.{REQUESTS}"),
]

UNHEARD = [
    ("worker", "generation.request.>"),
    ("worker", "_INBOX_sender.>"),
    ("worker", ">"),
    ("publisher", "generation.request.>"),
    ("publisher", "_INBOX_worker.>"),
    ("publisher", "_INBOX.>"),
    ("publisher", "generation.call.*"),
    ("publisher", "generation.cancel.*"),
    ("publisher", "$JS.ACK.>"),
    ("observer", "generation.request.>"),
    ("observer", "_INBOX_sender.>"),
    ("observer", "generation.call.*"),
    ("observer", "$SRV.>"),
]


@pytest.mark.parametrize(("role", "subject"), FORBIDDEN)
async def test_what_a_user_must_not_publish(
    installation: Installation, role: str, subject: str
) -> None:
    async with installation.client(role) as (client, refused):
        await client.publish(subject, b"")
        said = await asyncio.wait_for(refused.get(), WITHIN)
        assert "permissions violation for publish" in said
        assert subject.lower() in said


@pytest.mark.parametrize(("role", "subject"), UNHEARD)
async def test_what_a_user_must_not_hear(
    installation: Installation, role: str, subject: str
) -> None:
    async with installation.client(role) as (client, refused):
        await client.subscribe(subject)
        said = await asyncio.wait_for(refused.get(), WITHIN)
        assert "permissions violation for subscription" in said


async def test_what_an_observer_looks_at(installation: Installation) -> None:
    async with installation.client("observer") as (client, refused):
        jetstream: Any = client.jetstream()
        assert (await jetstream.stream_info(REQUESTS)).config.name == REQUESTS
        assert (await jetstream.consumer_info(REQUESTS, "text_to_image")).num_pending is not None
        await client.subscribe("generation.result.>")
        await client.subscribe("$JS.EVENT.ADVISORY.>")
        await client.flush()
        assert refused.empty()


async def test_nobody_is_let_in_without_a_key(installation: Installation) -> None:
    settings = Settings(nats_url=installation.stack.nats.url)
    async with AsyncExitStack():
        with pytest.raises(BusUnavailable, match="credentials are refused"):
            await connect(settings, name="test", within=2.0)
    with pytest.raises(Error):
        await nats.connect(
            installation.stack.nats.url, allow_reconnect=False, max_reconnect_attempts=0
        )
