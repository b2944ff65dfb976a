"""The accounts of infra/nats/accounts.conf: each tenant works, and reaches nothing of the other."""

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

from consumer.apply import apply
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
        folder: Where the seeds are.
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
        """The settings of a process of the operator, for one tenant."""
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
        """`consumer apply` for a tenant."""
        environment: dict[str, Any] = self.environment(tenant, "GENERATION_ADMIN", "_INBOX_admin")
        await apply(Settings(**{name.lower(): value for name, value in environment.items()}))

    def worker(self, tenant: str) -> Daemon:
        """A worker for a tenant, starting."""
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
        """A gateway for a tenant, not started yet."""
        name = tenant.replace("-", "_")
        return ForkedGateway(
            f"gateway-{tenant}",
            self.environment(tenant, f"{name.upper()}_GATEWAY", f"_INBOX_{name}_gateway"),
            log=self.folder / f"gateway-{tenant}.log",
        )

    def seed(self, user: str) -> str:
        """The file with a user's key."""
        return str(self.folder / user)

    def sender(self, tenant: str) -> GenerationClient:
        """The client library of a tenant."""
        key = self.seed(tenant.replace("-", "_").upper())
        return GenerationClient(self.stack.nats.url, root=tenant, nkeys_seed=key)

    @asynccontextmanager
    async def plain(self, user: str) -> AsyncIterator[Client]:
        """A plain connection of a user."""
        client = await nats.connect(self.stack.nats.url, nkeys_seed=self.seed(user))
        try:
            yield client
        finally:
            await client.close()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("accounts"))
    with made.stack:
        for tenant in (A, B):
            asyncio.run(made.apply(tenant))
        workers = [made.worker(tenant) for tenant in (A, B)]
        try:
            for worker in workers:
                worker.wait_ready()
            yield made
            for worker in workers:
                assert "ermissions violation" not in worker.log_since_start()
        finally:
            for worker in workers:
                worker.kill()


async def test_each_tenant_works_with_the_client_library(installation: Installation) -> None:
    """Results, progress, lookups and cancellations; the same id in both, at the same time."""

    async def work(tenant: str) -> None:
        async with installation.sender(tenant) as client:
            request = TextToImageRequest(prompt=tenant, request_id="shared", num_inference_steps=2)
            news = [event async for event in client.events(request)]
            assert any(isinstance(event, ProgressEvent) for event in news)
            assert news[-1].type == "generation.v1.succeeded"
            assert await client.result(TASK, "shared", within=0) == news[-1]
            await client.submit(
                TextToImageRequest(prompt="a", request_id="long", num_inference_steps=100)
            )
            running = asyncio.ensure_future(client.ended("long", within=WITHIN))
            assert (await client.cancel("long")).status in {"cancelled", "stopping"}
            assert await running == "generation.v1.cancelled"

    async with asyncio.timeout(WITHIN):
        await asyncio.gather(work(A), work(B))


async def test_each_tenant_works_with_plain_nats(installation: Installation) -> None:
    """A call is answered on the inbox, and a request on its `reply_to`."""
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


async def test_a_tenant_has_a_gateway_of_its_own(installation: Installation) -> None:
    """It sees its tenant's worker and requests; a worker of another tenant does not answer it."""
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
    # directly: occupy the id, cancel, stop, forge, note, call, answer
    "occupy": Attack(f"{A}.request.{TASK}.{SECRET}", b"{}", headers={"Nats-Msg-Id": SECRET}),
    "cancel": Attack(f"{A}.cancel.{SECRET}"),
    "interrupt": Attack(f"{A}.interrupt.{SECRET}"),
    "forge": Attack(RESULT, FORGED),
    "dead_letter": Attack(f"{A}.dead.{TASK}", b"{}"),
    "release_mark": Attack(f"{A}.released.{TASK}.1", b"{}"),
    "call": Attack(f"{A}.call.{TASK}", b'{"prompt":"a"}'),
    "reply": Attack(f"{A}.reply.mine", FORGED),
    "progress": Attack(f"{A}.progress.{TASK}.{SECRET}", FORGED),
    # with the reply subjects of what it may ask
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
    # with what a worker publishes for it
    "reply_to": Attack(
        f"{B}.request.{TASK}.replying",
        json.dumps({"prompt": "a", "reply_to": f"{A}.reply.mine"}).encode(),
    ),
    "reply_header": Attack(
        f"{B}.request.{TASK}.heading", b'{"prompt":"a"}', headers={"Reply-To": RESULT}
    ),
    # with the API of JetStream
    "look": Attack("$JS.API.STREAM.MSG.GET.TENANT-A_RESULTS", LAST),
    "look_in_queue": Attack(f"$JS.API.STREAM.MSG.GET.TENANT-A_REQUESTS_{TASK.upper()}", LAST),
    "look_directly": Attack(f"$JS.API.DIRECT.GET.TENANT-A_RESULTS.{RESULT}"),
    "look_by_mapping": Attack(f"{A}.stored.results", LAST),
    "delete": Attack("$JS.API.STREAM.DELETE.TENANT-A_RESULTS"),
    "purge": Attack("$JS.API.STREAM.PURGE.TENANT-A_RESULTS"),
    "erase": Attack("$JS.API.STREAM.MSG.DELETE.TENANT-A_RESULTS", b'{"seq":1}'),
    "read_along": Attack(
        "$JS.API.CONSUMER.CREATE.TENANT-A_RESULTS.mine",
        b'{"stream_name":"TENANT-A_RESULTS","config":{"deliver_subject":"mine"}}',
    ),
    "take": Attack(f"$JS.API.CONSUMER.MSG.NEXT.TENANT-A_REQUESTS_{TASK.upper()}.{TASK}", b"1"),
}


class Witness:
    """Everything that reaches the subjects, the streams and the account of tenant-a.

    Attributes:
        seen: Subject and beginning of each message.
    """

    def __init__(self, *clients: Client) -> None:
        self.seen: list[str] = []
        self._clients = clients

    async def listen(self) -> None:
        admin, tenant = self._clients
        for subject in (f"{A}.>", "$JS.API.*.*.TENANT-A_RESULTS", "$JS.API.*.*.*.TENANT-A_RESULTS"):
            await admin.subscribe(subject, cb=self._hear)
        await tenant.subscribe(">", cb=self._hear)
        await self.flush()

    async def flush(self) -> None:
        """Return once everything has come that the server had until now."""
        for client in self._clients:
            await client.flush()

    async def _hear(self, message: Msg) -> None:
        self.seen.append(f"{message.subject} {message.data[:200]!r}")


async def carry_out(installation: Installation, client: Client) -> list[Msg]:
    """Publish every attack as tenant-b, and return all answers once everything is handled."""
    replies = {attack.reply for attack in ATTACKS.values() if attack.reply}
    listening = [await client.subscribe(subject) for subject in ("answers.>", *replies)]
    for name, attack in ATTACKS.items():
        reply, headers = attack.reply or f"answers.{name}", attack.headers or None
        await client.publish(attack.subject, attack.body, reply=reply, headers=headers)
    # The server and the worker handle in order what one connection sends.
    await client.request(f"{B}.cancel.nothing", b"", timeout=WITHIN)
    async with installation.sender(B) as sender:
        for attack in ATTACKS.values():
            if attack.subject.startswith(f"{B}.request."):
                await sender.result(TASK, attack.subject.rpartition(".")[2], within=WITHIN)
    return [await each.next_msg(WITHIN) for each in listening for _ in range(each.pending_msgs)]


async def test_nothing_of_a_tenant_reaches_another(installation: Installation) -> None:
    async with (
        installation.plain("TENANT_B") as client,
        installation.plain("GENERATION_ADMIN") as admin,
        installation.plain("TENANT_A") as tenant,
    ):
        witness = Witness(admin, tenant)
        await witness.listen()
        answers = await carry_out(installation, client)
        await witness.flush()
        assert witness.seen == []
        own = [each for each in answers if each.subject.startswith((f"{A}.", "$JS."))]
        assert own, "what it may ask is answered in its own account"
        for each in answers:
            assert A.encode() not in each.data, each.subject
            assert b'"success":true' not in each.data, each.subject


async def test_nothing_of_a_tenant_is_heard_by_another(installation: Installation) -> None:
    """Progress, results and replies of a request, and how they travel."""
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        heard.append(message.subject)

    async with installation.plain("TENANT_B") as spy, installation.plain("TENANT_A") as client:
        for subject in (f"{A}.>", ">", "_R_.>", "$JS.>", "$SRV.>"):
            await spy.subscribe(subject, cb=hear)
        await spy.flush()
        body = b'{"prompt":"a","steps":1}'
        answer = await client.request(f"{A}.call.{TASK}", body, timeout=WITHIN)
        assert json.loads(answer.data)["type"] == "generation.v1.succeeded"
        await spy.flush()
        assert heard == []


async def test_an_id_that_another_tenant_uses_is_not_occupied(installation: Installation) -> None:
    """Neither by a request nor by a cancellation of the other, before or after."""
    async with installation.sender(A) as one, installation.sender(B) as other:
        await other.text_to_image("of b", request_id=SECRET, num_inference_steps=1)
        assert (await other.cancel("early")).status == "unknown"
        first = await one.text_to_image("of a", request_id=SECRET, num_inference_steps=1)
        assert (await other.cancel(SECRET)).status == "finished"
        early = await one.text_to_image("of a", request_id="early", num_inference_steps=1)
        assert early.type == "generation.v1.succeeded"
        assert await one.result(TASK, SECRET, within=0) == first
        assert (await other.result(TASK, SECRET, within=0)).request_digest != first.request_digest


# -- the file -------------------------------------------------------------------------------------


def permissions(text: str, user: str) -> set[str]:
    """What a user may publish, and what it may subscribe to, as `publish x` and `subscribe x`."""
    (block,) = re.findall(rf"nkey: \${user}_NKEY\n\s+permissions(.*?)\n      }}", text, re.DOTALL)
    lists = re.findall(r"(publish|subscribe) \{\s+allow: \[(.*?)\]", block, re.DOTALL)
    return {f"{kind} {each}" for kind, found in lists for each in re.findall(r'"(.+?)"', found)}


def test_a_tenants_worker_may_what_a_worker_may_under_its_own_root() -> None:
    """What is added to users.conf is added here."""
    users = USERS.read_text()
    roles = [role for role in ("WORKER", "ENDPOINTS") if f"GENERATION_{role}_NKEY" in users]
    usual = set().union(*(permissions(users, f"GENERATION_{role}") for role in roles))
    for tenant, user in ((A, "TENANT_A_WORKER"), (B, "TENANT_B_WORKER")):
        own = {
            each.replace(f"{tenant.upper()}_", "GENERATION_").replace(f"{tenant}.", "generation.")
            for each in permissions(ACCOUNTS.read_text(), user)
        }
        differences = {each for each in usual ^ own if "_INBOX_" not in each}
        one_by_one = {each for each in usual if each.startswith("publish generation.request.")}
        assert differences == {"publish _R_.>", *one_by_one - {"publish generation.request.>"}}


def test_a_tenants_gateway_may_what_a_gateway_may_under_its_own_root() -> None:
    usual = permissions(USERS.read_text(), "GENERATION_GATEWAY")
    for tenant, user in ((A, "TENANT_A_GATEWAY"), (B, "TENANT_B_GATEWAY")):
        own = {
            each.replace(f"{tenant.upper()}_", "GENERATION_").replace(f"{tenant}.", "generation.")
            for each in permissions(ACCOUNTS.read_text(), user)
        }
        assert {each for each in usual ^ own if "_INBOX_" not in each} == set()


def test_the_tenants_have_the_same_permissions_imports_and_exports() -> None:
    text = ACCOUNTS.read_text().partition("accounts {")[2]
    names = ("tenant-{}", "tenant_{}", "TENANT-{}", "TENANT_{}")
    first = [text.count(name.format("a" if name.islower() else "A")) for name in names]
    assert min(first) > 0
    assert first == [text.count(name.format("b" if name.islower() else "B")) for name in names]
