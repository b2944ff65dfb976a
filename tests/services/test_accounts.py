"""The accounts of infra/nats/accounts.conf: tenants work and are isolated from each other."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import nats
import nkeys
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from consumer.app.apply import apply
from consumer.devstack import Daemon, DevStack, GatewayServer
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import ProgressEvent, Task, TextToImageRequest
from tests.support.forked import ForkedGateway, ForkedWorker
from tests.support.quick_runner import FOLDER
from tests.support.scene import ROOT, WITHIN

ACCOUNTS = ROOT / "infra" / "nats" / "accounts.conf"
USERS = ROOT / "infra" / "nats" / "users.conf"
A, B = "tenant-a", "tenant-b"
KEY = re.compile(r"nkey: \$(\w+)_NKEY")
TASK = Task.TEXT_TO_IMAGE
SECRET = "known-to-both"  # the id of a request of tenant-a


class Installation:
    """A server with the accounts, and a worker for each tenant.

    Attributes:
        stack: The servers.
        folder: Folder of the seeds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = ACCOUNTS.read_text()
        variables = "".join(f"{name}_NKEY: {self._key(name)}\n" for name in KEY.findall(config))
        self.stack = DevStack(folder / "stack", persist=False, nats_config=variables + config)

    def _key(self, name: str) -> str:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        (self.folder / name).write_bytes(seed)
        return str(nkeys.from_seed(bytearray(seed)).public_key.decode())

    def environment(self, tenant: str, user: str, inbox: str) -> dict[str, str]:
        """Return the settings of an operator's process for a tenant."""
        name = tenant.replace("-", "_")
        return {
            **self.stack.environment(),
            "NATS_NKEY_SEED": str(self.folder / user),
            "NATS_INBOX_PREFIX": inbox,
            "CONSUMER_SUBJECT_ROOT": tenant,
            "CONSUMER_REPLY_PREFIXES": f"_R_.,_INBOX_{name}_gateway.,{tenant}.reply.",
            "S3_BUCKET": tenant,
            "MODEL_TYPE": str(TASK),
        }

    async def apply(self, tenant: str) -> None:
        """Run `consumer apply` for a tenant."""
        environment: dict[str, Any] = self.environment(tenant, "GENERATION_ADMIN", "_INBOX_admin")
        await apply(Settings(**{name.lower(): value for name, value in environment.items()}))

    def worker(self, tenant: str) -> Daemon:
        """Start a worker for a tenant, without waiting until it is ready."""
        name = tenant.replace("-", "_")
        worker = ForkedWorker(
            tenant,
            {
                **self.environment(tenant, f"{name.upper()}_WORKER", f"_INBOX_{name}_worker"),
                FOLDER: str(self.folder),
            },
            log=self.folder / f"{tenant}.log",
            cause="slow_steps",
        )
        worker.start()
        return worker

    def gateway(self, tenant: str) -> GatewayServer:
        """Return a gateway for a tenant; the caller starts it."""
        name = tenant.replace("-", "_")
        return ForkedGateway(
            f"gateway-{tenant}",
            self.environment(tenant, f"{name.upper()}_GATEWAY", f"_INBOX_{name}_gateway"),
            log=self.folder / f"gateway-{tenant}.log",
        )

    def seed(self, user: str) -> str:
        """Return the path of a user's seed."""
        return str(self.folder / user)

    def sender(self, tenant: str) -> GenerationClient:
        """Return a client for a tenant."""
        key = self.seed(tenant.replace("-", "_").upper())
        return GenerationClient(self.stack.nats.url, root=tenant, nkeys_seed=key)

    @asynccontextmanager
    async def plain(self, user: str) -> AsyncIterator[Client]:
        """Open a plain connection of a user."""
        client = await nats.connect(self.stack.nats.url, nkeys_seed=self.seed(user))
        try:
            yield client
        finally:
            await client.close()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    created = Installation(tmp_path_factory.mktemp("accounts"))
    with created.stack:
        for tenant in (A, B):
            asyncio.run(created.apply(tenant))
        workers = [created.worker(tenant) for tenant in (A, B)]
        try:
            for worker in workers:
                worker.wait_ready()
            yield created
            for worker in workers:
                assert "ermissions violation" not in worker.log_since_start()
        finally:
            for worker in workers:
                worker.kill()


async def test_each_tenant_can_use_the_client_library(installation: Installation) -> None:
    """Results, progress, lookups and cancellations, with equal ids at the same time."""

    async def work(tenant: str) -> None:
        async with installation.sender(tenant) as client:
            request = TextToImageRequest(prompt=tenant, request_id="shared", num_inference_steps=2)
            events = [event async for event in client.events(request)]
            assert any(isinstance(event, ProgressEvent) for event in events)
            assert events[-1].type == "generation.v1.succeeded"
            assert await client.result(TASK, "shared", within=0) == events[-1]
            await client.submit(
                TextToImageRequest(prompt="a", request_id="long", num_inference_steps=100)
            )
            running = asyncio.ensure_future(client.ended("long", within=WITHIN))
            assert (await client.cancel("long")).status in {"cancelled", "stopping"}
            assert await running == "generation.v1.cancelled"
            image = await client.download(events[-1].outputs[0])  # type: ignore[union-attr,arg-type]
            assert (await client.upload(image)).key.startswith("uploads/")

    async with asyncio.timeout(WITHIN):
        await asyncio.gather(work(A), work(B))


async def test_each_tenant_can_use_plain_nats(installation: Installation) -> None:
    """The worker replies to a call on the inbox and to a request on its `reply_to`."""
    for tenant in (A, B):
        async with installation.plain(tenant.replace("-", "_").upper()) as client:
            body = {"prompt": "a", "steps": 1}
            answer = await client.request(
                f"{tenant}.call.{TASK}", json.dumps(body).encode(), timeout=WITHIN
            )
            assert json.loads(answer.data)["type"] == "generation.v1.succeeded"
            replies = await client.subscribe(f"{tenant}.reply.mine")
            stored = await client.jetstream().publish(
                f"{tenant}.request.{TASK}.replied",
                json.dumps({**body, "reply_to": f"{tenant}.reply.mine"}).encode(),
            )
            assert stored.stream == f"{tenant.upper()}_REQUESTS_{TASK.upper()}"
            assert json.loads((await replies.next_msg(WITHIN)).data)["request_id"] == "replied"


async def test_each_tenant_can_have_a_gateway(installation: Installation) -> None:
    """The gateway reaches only the worker and the requests of its tenant."""
    with installation.gateway(A) as gateway:
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=WITHIN) as client:
            (model,) = [
                model
                for model in (await client.get("/v1/models")).json()["data"]
                if str(TASK) in model["tasks"]
            ]
            drawn = await client.post(
                "/v1/images/generations",
                json={"prompt": "a", "num_inference_steps": 1, "model": model["id"]},
            )
            assert drawn.status_code == 200, drawn.text
            long = {"task": str(TASK), "prompt": "a", "num_inference_steps": 200}
            job = (await client.post("/v1/jobs", json=long)).json()
            assert (await client.get(job["status_url"])).json()["position"] is not None
            assert (await client.delete(job["cancel_url"])).status_code in {200, 202}
            assert "event: cancelled" in (await client.get(job["events_url"])).text
            assert len((await client.get("/v1/jobs")).json()["data"]) == 2
    assert "ermissions violation" not in gateway.log_since_start()


# -- attacks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """A message that tenant-b publishes against tenant-a."""

    subject: str
    body: bytes = b""
    reply: str = ""
    headers: dict[str, str] = field(default_factory=dict)


RESULT = f"{A}.result.{TASK}.{SECRET}"
LAST = json.dumps({"last_by_subj": RESULT}).encode()
FORGED = json.dumps({"request_id": SECRET, "type": "generation.v1.cancelled"}).encode()

ATTACKS = {
    # direct messages: use the id, cancel, interrupt, forge events and marks, call, reply
    "occupy": Attack(f"{A}.request.{TASK}.{SECRET}", b"{}", headers={"Nats-Msg-Id": SECRET}),
    "cancel": Attack(f"{A}.cancel.{SECRET}"),
    "upload": Attack(f"{A}.upload", b'{"size":9,"media_type":"image/png"}'),
    "upload_reply_as_cancel": Attack(f"{B}.upload", b"{", reply=f"{A}.cancel.{SECRET}"),
    "interrupt": Attack(f"{A}.interrupt.{SECRET}"),
    "forge": Attack(RESULT, FORGED),
    "dead_letter": Attack(f"{A}.dead.{TASK}", b"{}"),
    "release_mark": Attack(f"{A}.released.{TASK}.1", b"{}"),
    "call": Attack(f"{A}.call.{TASK}", b'{"prompt":"a"}'),
    "reply": Attack(f"{A}.reply.mine", FORGED),
    "progress": Attack(f"{A}.progress.{TASK}.{SECRET}", FORGED),
    # through the reply subjects of allowed requests
    "ack_as_result": Attack(f"{B}.request.{TASK}.x", b"{}", reply=RESULT),
    "ack_as_request": Attack(f"{B}.request.{TASK}.x", b"{}", reply=f"{A}.request.{TASK}.y"),
    "refusal_as_result": Attack(f"{B}.call.{TASK}", b"{}", reply=RESULT),
    "cancel_reply_as_cancel": Attack(f"{B}.cancel.nothing", reply=f"{A}.cancel.{SECRET}"),
    "cancel_reply_as_delete": Attack(
        f"{B}.cancel.nothing", reply="$JS.API.STREAM.DELETE.TENANT-A_RESULTS"
    ),
    "lookup_as_result": Attack(
        "$JS.API.STREAM.MSG.GET.TENANT-B_RESULTS",
        json.dumps({"last_by_subj": f"{B}.result.{TASK}.planted"}).encode(),
        reply=RESULT,
    ),
    "lookup_as_purge": Attack(
        "$JS.API.STREAM.MSG.GET.TENANT-B_RESULTS",
        b"{}",
        reply="$JS.API.STREAM.PURGE.TENANT-A_RESULTS",
    ),
    "ping_as_result": Attack("$SRV.PING", reply=RESULT),
    # through events that a worker publishes for tenant-b
    "reply_to": Attack(
        f"{B}.request.{TASK}.replying",
        json.dumps({"prompt": "a", "reply_to": f"{A}.reply.mine"}).encode(),
    ),
    "reply_header": Attack(
        f"{B}.request.{TASK}.heading", b'{"prompt":"a"}', headers={"Reply-To": RESULT}
    ),
    # through the JetStream API
    "lookup": Attack("$JS.API.STREAM.MSG.GET.TENANT-A_RESULTS", LAST),
    "lookup_in_queue": Attack(f"$JS.API.STREAM.MSG.GET.TENANT-A_REQUESTS_{TASK.upper()}", LAST),
    "lookup_direct": Attack(f"$JS.API.DIRECT.GET.TENANT-A_RESULTS.{RESULT}"),
    "lookup_by_mapping": Attack(f"{A}.stored.results", LAST),
    "delete": Attack("$JS.API.STREAM.DELETE.TENANT-A_RESULTS"),
    "purge": Attack("$JS.API.STREAM.PURGE.TENANT-A_RESULTS"),
    "erase": Attack("$JS.API.STREAM.MSG.DELETE.TENANT-A_RESULTS", b'{"seq":1}'),
    "create_consumer": Attack(
        "$JS.API.CONSUMER.CREATE.TENANT-A_RESULTS.mine",
        b'{"stream_name":"TENANT-A_RESULTS","config":{"deliver_subject":"mine"}}',
    ),
    "fetch": Attack(f"$JS.API.CONSUMER.MSG.NEXT.TENANT-A_REQUESTS_{TASK.upper()}.{TASK}", b"1"),
}


class Witness:
    """Records all messages on the subjects, the streams and the account of tenant-a.

    Attributes:
        received: Subject and first bytes of each message.
    """

    def __init__(self, *clients: Client) -> None:
        self.received: list[str] = []
        self._clients = clients

    async def listen(self) -> None:
        admin, tenant = self._clients
        for subject in (f"{A}.>", "$JS.API.*.*.TENANT-A_RESULTS", "$JS.API.*.*.*.TENANT-A_RESULTS"):
            await admin.subscribe(subject, cb=self._receive)
        await tenant.subscribe(">", cb=self._receive)
        await self.flush()

    async def flush(self) -> None:
        """Wait for all messages that the server has routed so far."""
        for client in self._clients:
            await client.flush()

    async def _receive(self, message: Msg) -> None:
        self.received.append(f"{message.subject} {message.data[:200]!r}")


async def run_attacks(installation: Installation, client: Client) -> list[Msg]:
    """Publish every attack as tenant-b, wait until all are handled, and return the replies."""
    reply_subjects = {attack.reply for attack in ATTACKS.values() if attack.reply}
    listening = [await client.subscribe(subject) for subject in ("answers.>", *reply_subjects)]
    for name, attack in ATTACKS.items():
        reply, headers = attack.reply or f"answers.{name}", attack.headers or None
        await client.publish(attack.subject, attack.body, reply=reply, headers=headers)
    # The server and the worker handle the messages of one connection in order.
    await client.request(f"{B}.cancel.nothing", b"", timeout=WITHIN)
    async with installation.sender(B) as sender:
        for attack in ATTACKS.values():
            if attack.subject.startswith(f"{B}.request."):
                await sender.result(TASK, attack.subject.rpartition(".")[2], within=WITHIN)
    return [await each.next_msg(WITHIN) for each in listening for _ in range(each.pending_msgs)]


async def test_messages_of_a_tenant_do_not_reach_another_tenant(installation: Installation) -> None:
    async with (
        installation.plain("TENANT_B") as client,
        installation.plain("GENERATION_ADMIN") as admin,
        installation.plain("TENANT_A") as tenant,
    ):
        witness = Witness(admin, tenant)
        await witness.listen()
        replies = await run_attacks(installation, client)
        await witness.flush()
        assert witness.received == []
        allowed = [each for each in replies if each.subject.startswith((f"{A}.", "$JS."))]
        assert allowed, "tenant-b gets replies to its allowed requests"
        for each in replies:
            assert A.encode() not in each.data, each.subject
            assert b'"success":true' not in each.data, each.subject


async def test_a_tenant_cannot_receive_messages_of_another_tenant(
    installation: Installation,
) -> None:
    """Progress, results and replies of a request, and the messages that carry them."""
    received: list[str] = []

    async def record(message: Msg) -> None:
        received.append(message.subject)

    async with installation.plain("TENANT_B") as spy, installation.plain("TENANT_A") as client:
        for subject in (f"{A}.>", ">", "_R_.>", "$JS.>", "$SRV.>"):
            await spy.subscribe(subject, cb=record)
        await spy.flush()
        body = b'{"prompt":"a","steps":1}'
        answer = await client.request(f"{A}.call.{TASK}", body, timeout=WITHIN)
        assert json.loads(answer.data)["type"] == "generation.v1.succeeded"
        await spy.flush()
        assert received == []


async def test_two_tenants_can_use_the_same_id(installation: Installation) -> None:
    """Requests and cancellations of one tenant do not affect equal ids of the other."""
    async with installation.sender(A) as one, installation.sender(B) as other:
        await other.text_to_image("of b", request_id=SECRET, num_inference_steps=1)
        assert (await other.cancel("early")).status == "unknown"
        first = await one.text_to_image("of a", request_id=SECRET, num_inference_steps=1)
        assert (await other.cancel(SECRET)).status == "finished"
        early = await one.text_to_image("of a", request_id="early", num_inference_steps=1)
        assert early.type == "generation.v1.succeeded"
        assert await one.result(TASK, SECRET, within=0) == first
        assert (await other.result(TASK, SECRET, within=0)).request_digest != first.request_digest


# -- permissions in the file ----------------------------------------------------------------------


def permissions(text: str, user: str) -> set[str]:
    """Return the permissions of a user, as `publish SUBJECT` and `subscribe SUBJECT`."""
    (block,) = re.findall(rf"nkey: \${user}_NKEY\n\s+permissions(.*?)\n      }}", text, re.DOTALL)
    lists = re.findall(r"(publish|subscribe) \{\s+allow: \[(.*?)\]", block, re.DOTALL)
    return {f"{kind} {each}" for kind, found in lists for each in re.findall(r'"(.+?)"', found)}


def test_a_tenant_worker_has_the_permissions_of_a_worker_under_its_root() -> None:
    """A permission that is new in users.conf must be added to accounts.conf."""
    users = USERS.read_text()
    roles = [role for role in ("WORKER", "ENDPOINTS") if f"GENERATION_{role}_NKEY" in users]
    standard = set().union(*(permissions(users, f"GENERATION_{role}") for role in roles))
    for tenant, user in ((A, "TENANT_A_WORKER"), (B, "TENANT_B_WORKER")):
        own = {
            each.replace(f"{tenant.upper()}_", "GENERATION_").replace(f"{tenant}.", "generation.")
            for each in permissions(ACCOUNTS.read_text(), user)
        }
        differences = {each for each in standard ^ own if "_INBOX_" not in each}
        one_by_one = {each for each in standard if each.startswith("publish generation.request.")}
        assert differences == {"publish _R_.>", *one_by_one - {"publish generation.request.>"}}


def test_a_tenant_gateway_has_the_permissions_of_a_gateway_under_its_root() -> None:
    standard = permissions(USERS.read_text(), "GENERATION_GATEWAY")
    for tenant, user in ((A, "TENANT_A_GATEWAY"), (B, "TENANT_B_GATEWAY")):
        own = {
            each.replace(f"{tenant.upper()}_", "GENERATION_").replace(f"{tenant}.", "generation.")
            for each in permissions(ACCOUNTS.read_text(), user)
        }
        assert {each for each in standard ^ own if "_INBOX_" not in each} == set()


def test_the_tenants_have_equal_permissions_imports_and_exports() -> None:
    text = ACCOUNTS.read_text().partition("accounts {")[2]
    names = ("tenant-{}", "tenant_{}", "TENANT-{}", "TENANT_{}")
    first = [text.count(name.format("a" if name.islower() else "A")) for name in names]
    assert min(first) > 0
    assert first == [text.count(name.format("b" if name.islower() else "B")) for name in names]
