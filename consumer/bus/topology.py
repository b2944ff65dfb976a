"""Streams and durable consumers, from the JSON files under infra/nats.

The files have the default queue of each task. Another queue gets copies of the files of its task,
or of the first task.

The files use the server's own format (`nats stream add --config FILE` reads them as well). Existing
streams and consumers are compared with the files key by key. `apply` updates with the full
configuration, because the server resets settings that a partial one leaves out. `ensure` creates
what is missing, refuses differences that would break a guarantee, and logs all other differences.
"""

import json
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import structlog
from nats.errors import Error, NoRespondersError

from consumer.bus.codes import (
    CONSUMER_NOT_FOUND,
    NO_STORAGE,
    STREAM_NOT_FOUND,
    SUBJECTS_OVERLAP,
)
from consumer.bus.connection import API_TIMEOUT, Bus, BusMisconfigured, BusUnavailable
from consumer.bus.reading import StoredMessage, read_message
from consumer.bus.results import event_of
from consumer.bus.server_texts import is_permission_error
from consumer.ports.bus import ResultUnreadable
from consumer.ports.unavailable import Unavailable
from generation_contracts import Subjects, Task
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.queues import CREATED_BY_KEY, TASK_KEY, QueueInfo

log = structlog.get_logger()

NANOSECONDS = 1_000_000_000
WORKER_TIMEOUT = 0.2  # seconds; without a connected worker the server replies at once
_FILES = Subjects()  # the subjects in the files
_SHARED = (
    _FILES.results_stream,
    _FILES.dead_letters_stream,
    _FILES.releases_stream,
    _FILES.retries_stream,
    _FILES.advisories_stream,
)
_MAX_DELIVERIES = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
_NOT_FOUND = frozenset({STREAM_NOT_FOUND, CONSUMER_NOT_FOUND})

# A difference in one of these keys breaks a guarantee: requests would be lost or run twice, or
# results would not be found.
_REQUIRED = frozenset(
    {"subjects", "retention", "discard", "storage", "allow_direct"}
    | {"max_msgs_per_subject", "discard_new_per_subject"}
    | {"filter_subjects", "filter_subject", "deliver_policy", "ack_policy", "backoff"}
)

# Settings that a consumer must not have. The first entry of a backoff overrides ack_wait, and thus
# the lease. The server refuses filter_subject in addition to filter_subjects.
_NOT_FOR_CONSUMERS: dict[str, Any] = {"backoff": [], "filter_subject": ""}
# A consumer must not have filters unless the file has them: at each delivery the server compares
# the filters with every pending subject. With 50,000 requests this takes 25 ms of CPU.
_WITHOUT_FILTERS: dict[str, Any] = {"filter_subjects": []}

# The worker counts attempts; the server counts deliveries, including requeued ones. The server's
# limit is only for requests that kill a worker before it can count.
DELIVERIES_PER_ATTEMPT = 10
ADVISORIES_DIVISOR = 16  # of max_bytes: the stream of one queue is smaller than the shared one
SIZES = {"default": 1, "small": 16}  # divisors of the files' max_bytes

Change = Literal["created", "updated", "unchanged"]
Sizes = Literal["default", "small"]
Config = dict[str, Any]


class TopologyError(Unavailable):
    """A stream or consumer has a wrong setting, or cannot be created or updated; one line."""


class _OverlapError(TopologyError):
    """Another stream has the subjects of a new stream."""


class _NoStorageError(TopologyError):
    """The account or the server has less storage than a stream reserves."""


class PartlyApplied(TopologyError):  # noqa: N818 - a state of the topology
    """Changes that would harm current deliveries or stored messages were not applied."""


@dataclass(frozen=True)
class Durable:
    """The configuration of a durable consumer as the server has it.

    Attributes:
        ack_wait: Duration of a lease, in seconds.
        max_ack_pending: Limit of deliveries in flight, over all workers.
        max_deliver: Limit of deliveries of one message, including those that are not attempts; less
            than 1 means no limit.
    """

    stream: str
    name: str
    ack_wait: float
    max_ack_pending: int
    max_deliver: int

    @property
    def max_attempts(self) -> int:
        """Limit of attempts of a request, over all workers."""
        return max(1, self.max_deliver // DELIVERIES_PER_ATTEMPT)


class Topology:
    """The streams of one installation and the durables of its queues.

    Args:
        bus: A connection.
        subjects: The root determines the names of streams and subjects.
        ack_wait: Seconds, for durables that are created or updated.
        max_ack_pending: For durables that are created or updated.
        max_deliver: For durables that are created or updated; None uses the value of the files. A
            request that reaches it is dead-lettered, see `dead_letters.exhausted`.
        durable_name: Overrides the name of the durable in the files, for one queue.
        queue: A queue in addition to the default queues, or a default queue that declares its
            model. `apply` writes its task and its model into the metadata of its stream.
        replicas: Number of servers that store each stream. None uses the value of the files for a
            new stream, and leaves an existing stream unchanged.
        sizes: `small` is a sixteenth of the files' max_bytes.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        ack_wait: float,
        max_ack_pending: int,
        max_deliver: int | None = None,
        durable_name: str | None = None,
        queue: QueueInfo | None = None,
        replicas: int | None = None,
        sizes: Sizes = "default",
    ) -> None:
        self._bus = bus
        self._sizes = sizes
        self._subjects = subjects
        self._ack_wait = ack_wait
        self._max_ack_pending = max_ack_pending
        self._max_deliver = max_deliver
        self._durable_name = durable_name
        self._queue = queue
        self._replicas = replicas

    async def apply(self, queues: tuple[str, ...]) -> dict[str, Change]:
        """Create or update every stream and the queues' durables.

        Returns:
            The change of each stream and durable, by name.

        Raises:
            TopologyError: The server refuses a change, or has too little storage; in that case
                nothing was created.
            PartlyApplied: Settings that would have shortened current leases or dropped stored
                messages were not applied; everything else was.
            BusUnavailable: The server does not answer.
        """
        done: dict[str, Change] = {}
        skipped: list[str] = []
        streams = [
            (expected, await self._call(f"STREAM.INFO.{expected['name']}"))
            for expected in self._declared(self._streams())
        ]
        await self._require_storage(streams)
        for expected, found in streams:
            done[expected["name"]] = await self._apply_stream(expected, found, skipped)
        for queue in queues:
            stream, expected = self._subjects.requests_stream(queue), self._consumer(queue)
            done[expected["durable_name"]] = await self._apply_consumer(stream, expected, skipped)
            stream, expected = self._subjects.retries_stream, self._retries(queue)
            done[f"retries {queue}"] = await self._apply_consumer(stream, expected, skipped)
            stream, expected = self._subjects.advisories_stream_of(queue), self._watcher(queue)
            name = f"watcher {expected['durable_name']}"
            done[name] = await self._apply_consumer(stream, expected, skipped)
        if skipped:
            raise PartlyApplied("; ".join(skipped))
        return done

    async def ensure(self, queue: str) -> Durable:
        """Create missing streams and durables, and validate the existing ones.

        Returns:
            The durable as the server has it. Its `ack_wait` and `max_ack_pending` may have been set
            by `consumer apply` for more workers, and are not changed.

        Raises:
            TopologyError: A stream or durable would break a guarantee, or cannot be created.
            BusUnavailable: The server does not answer.
        """
        for expected in self._streams():
            found = await self._call(f"STREAM.INFO.{expected['name']}")
            if found is None:
                await self._create_missing(expected)
                log.info("stream_created", stream=expected["name"])
            else:
                self._compare_stream(expected, found["config"])
        advisories = self._subjects.advisories_stream_of(queue)
        await self._ensure_consumer(advisories, self._watcher(queue))
        await self._ensure_consumer(self._subjects.retries_stream, self._retries(queue))
        stream = self._subjects.requests_stream(queue)
        return await self._ensure_consumer(stream, self._consumer(queue))

    def watcher(self, queue: str) -> Durable:
        """Return the durable for the server's max-deliver advisories, as `ensure` creates it."""
        expected = self._watcher(queue)
        return _durable(self._subjects.advisories_stream_of(queue), expected, expected)

    def retries(self, queue: str) -> Durable:
        """Return the durable of a queue's retries, as `ensure` creates it."""
        expected = self._retries(queue)
        return _durable(self._subjects.retries_stream, expected, expected)

    async def verify(self, queue: str) -> Durable:
        """Validate all streams and durables without a change, for `consumer check`.

        Raises:
            TopologyError: A stream or durable is missing or would break a guarantee.
            BusUnavailable: The server does not answer.
        """
        for expected in self._streams():
            found = await self._call(f"STREAM.INFO.{expected['name']}")
            if found is None:
                raise TopologyError(
                    f"stream {expected['name']}: missing; {self._how_to_create(expected)}"
                )
            self._compare_stream(expected, found["config"])
        advisories = self._subjects.advisories_stream_of(queue)
        await self._verify_consumer(advisories, self._watcher(queue))
        await self._verify_consumer(self._subjects.retries_stream, self._retries(queue))
        stream = self._subjects.requests_stream(queue)
        return await self._verify_consumer(stream, self._consumer(queue))

    def durable_name(self, queue: str) -> str:
        """Return the name of the durable of a queue."""
        name: str = self._consumer(queue)["durable_name"]
        return name

    def _streams(self) -> list[Config]:
        queues: list[str] = [str(task) for task in DEFAULT_QUEUES]
        configs = [self._rooted(f"streams/{stream}.json") for stream in _SHARED]
        if self._queue is not None and not self._queue.is_default:
            queues.append(self._queue.name)
            configs.append(self._own_advisories(self._queue))
        configs[:0] = [self._requests(queue) for queue in queues]
        for config in configs:
            config["max_bytes"] //= SIZES[self._sizes]
            if self._replicas is not None:
                config["num_replicas"] = self._replicas
        return configs

    def _requests(self, queue: str) -> Config:
        file = _FILES.requests_stream(self._template(queue))
        config = self._rooted(f"streams/{file}.json", queue=queue)
        if self._queue is not None and not self._queue.is_default and queue == self._queue.name:
            config["metadata"] = self._queue.metadata
        return config

    def _declared(self, configs: list[Config]) -> list[Config]:
        """Add the metadata of a default queue that declares its model."""
        queue = self._queue
        if queue is not None and queue.model is not None:
            for config in configs:
                if config["name"] == self._subjects.requests_stream(queue.name):
                    config["metadata"] = queue.metadata
        return configs

    def _own_advisories(self, queue: QueueInfo) -> Config:
        """Return the configuration of the advisories stream of a queue that is no default queue."""
        config = self._rooted(f"streams/{_FILES.advisories_stream}.json")
        return {
            **config,
            "name": self._subjects.advisories_stream_of(queue.name),
            "subjects": [f"{_MAX_DELIVERIES}.{self._subjects.requests_stream(queue.name)}.*"],
            "max_bytes": config["max_bytes"] // ADVISORIES_DIVISOR,
        }

    def _template(self, queue: str) -> Task:
        """Return the task whose files are copied for a queue."""
        named = self._queue is not None and queue == self._queue.name
        task = self._queue.task if named and self._queue is not None else Task(queue)
        return task if task in DEFAULT_QUEUES else DEFAULT_QUEUES[0]

    def _how_to_create(self, expected: Config) -> str:
        queue = self._queue
        if queue is None or queue.is_default or "metadata" not in expected:
            return "run `consumer apply`"
        return f"run `consumer queues create {queue.name} --task {queue.task}`"

    async def _create_missing(self, expected: Config) -> None:
        try:
            await self._create_stream(expected)
        except BusMisconfigured as error:
            raise BusMisconfigured(f"{error}; {self._how_to_create(expected)}") from None

    def _with_current_replicas(self, expected: Config, found: Config) -> Config:
        """Return the expected configuration of an existing stream.

        Without a setting, its number of replicas is the operator's choice.
        """
        if self._replicas is not None:
            return expected
        return {**expected, "num_replicas": found["num_replicas"]}

    def _compare_stream(self, expected: Config, found: Config) -> None:
        _compare(f"stream {expected['name']}", self._with_current_replicas(expected, found), found)

    def _consumer(self, queue: str) -> Config:
        expected = self._rooted(f"consumers/{self._template(queue)}.json", queue=queue)
        expected["ack_wait"] = round(self._ack_wait * NANOSECONDS)
        expected["max_ack_pending"] = self._max_ack_pending
        if self._max_deliver is not None:
            expected["max_deliver"] = self._max_deliver
        return self._named(expected)

    def _watcher(self, queue: str) -> Config:
        expected = self._rooted(f"watchers/{self._template(queue)}.json", queue=queue)
        if self._durable_name is not None:
            expected["filter_subjects"] = [
                subject.removesuffix(f".{queue}") + f".{self._durable_name}"
                for subject in expected["filter_subjects"]
            ]
        return self._named(expected)

    def _retries(self, queue: str) -> Config:
        # Not `durable_name`: all queues share the retries stream, and each needs its own consumer.
        expected = self._rooted(f"retries/{self._template(queue)}.json", queue=queue)
        return {**expected, "name": expected["durable_name"], **_NOT_FOR_CONSUMERS}

    def _named(self, expected: Config) -> Config:
        name = self._durable_name or expected["durable_name"]
        named = {**expected, "durable_name": name, "name": name}
        return {**_WITHOUT_FILTERS, **named, **_NOT_FOR_CONSUMERS}

    def _rooted(self, name: str, *, queue: str | None = None) -> Config:
        text = _definition(name)
        if queue is not None:
            task = self._template(queue)
            text = text.replace(task.upper(), queue.upper()).replace(task, queue)
        config: Config = json.loads(text)
        if "name" in config:
            config["name"] = self._rooted_stream(config["name"])
        for key in ("subjects", "filter_subjects"):
            if key in config:
                config[key] = [self._rooted_subject(subject) for subject in config[key]]
        return config

    def _rooted_subject(self, subject: str) -> str:
        # The subjects of advisories contain the name of the stream.
        named = self._rooted_stream(subject)
        return named.replace(f"{_FILES.root}.", f"{self._subjects.root}.", 1)

    def _rooted_stream(self, text: str) -> str:
        return text.replace(_family(_FILES), _family(self._subjects), 1)

    async def _require_storage(self, streams: list[tuple[Config, Config | None]]) -> None:
        """Validate that the storage suffices for all streams, before any change.

        Raises:
            TopologyError: The storage does not suffice.
        """
        needed, tier = 0, ""
        for expected, found in streams:
            before = {} if found is None else found["config"]
            copies = (
                before["num_replicas"]
                if before and not self._replicas
                else expected["num_replicas"]
            )
            tier = f"R{copies}"
            needed += expected["max_bytes"] * copies
            needed -= max(0, before.get("max_bytes", 0)) * before.get("num_replicas", 1)
        if needed <= 0:
            return
        account = await self._call("INFO") or {}
        account = {**account, **account.get("tiers", {}).get(tier, {})}
        limit = account["limits"]["max_storage"]
        free = limit - max(account.get("reserved_storage", 0), account["storage"])
        if limit >= 0 and free < needed:
            raise self._no_storage(needed, f"the account has {_size(free)} left of {_size(limit)}")
        # The limit of the account may exceed the storage of the server. In a cluster, no single
        # server needs the whole amount.
        if not self._bus.clustered:
            await self._require_reservation(needed)

    async def _require_reservation(self, needed: int) -> None:
        # The API does not report the free storage of the server, but the server refuses a stream
        # that exceeds it.
        name = f"{_family(self._subjects)}SIZE_CHECK"
        subjects = [f"{self._subjects.root}.size-check"]
        try:
            await self._call(
                f"STREAM.CREATE.{name}",
                {"name": name, "subjects": subjects, "max_bytes": needed, "num_replicas": 1},
            )
        except _NoStorageError:
            raise self._no_storage(needed, "the server has less left") from None
        await self._call(f"STREAM.DELETE.{name}")

    def _no_storage(self, needed: int, there: str) -> TopologyError:
        small = "" if self._sizes == "small" else "set NATS_STREAM_SIZES=small (a sixteenth), or "
        return TopologyError(
            f"the streams reserve {_size(needed)} and {there}; nothing was created: {small}give "
            "NATS more storage (max_file of the account, max_file_store of the server)"
        )

    async def _create_stream(self, expected: Config) -> None:
        try:
            await self._call(f"STREAM.CREATE.{expected['name']}", expected)
        except _OverlapError as error:
            raise await self._explained(error, expected["name"]) from None
        except _NoStorageError as error:
            raise TopologyError(
                f"{error}; it reserves {_size(expected['max_bytes'])} for each copy, and "
                "NATS_STREAM_SIZES=small a sixteenth"
            ) from None

    async def _explained(self, error: TopologyError, name: str) -> TopologyError:
        former = f"{_family(self._subjects)}REQUESTS"  # when all tasks had one stream
        if not name.startswith(f"{former}_"):
            return error
        found = await self._call(f"STREAM.INFO.{former}")
        if found is None:
            return error
        return TopologyError(
            f"stream {name}: {former}, the request stream of an earlier version, stores its "
            f"subjects (requests in it: {found['state']['messages']}); let the earlier workers "
            f"empty it, then delete it (`nats stream rm {former}`)"
        )

    async def _apply_stream(
        self, expected: Config, found: Config | None, skipped: list[str]
    ) -> Change:
        if found is None:
            await self._create_stream(expected)
            return "created"
        expected = self._with_current_replicas(expected, found["config"])
        if self._would_drop(expected, found):
            current = found["config"]["max_bytes"]
            skipped.append(
                f"stream {expected['name']}: max_bytes stays at {_size(current)}: it contains "
                f"{_size(found['state']['bytes'])}, and the oldest messages would be dropped; "
                "remove them first, or set NATS_STREAM_SIZES=default"
            )
            expected["max_bytes"] = current
        _require_same_task(expected, found["config"])
        if not _differences(expected, found["config"]):
            return "unchanged"
        if expected["name"] == self._subjects.results_stream:
            await self._keep_first_results(found)
        # Settings that the files do not have keep the operator's value.
        update = {**found["config"], **expected}
        if "metadata" in expected:
            update["metadata"] = {**expected["metadata"], **_metadata(found["config"])}
            update["metadata"] |= _declaration(expected)
        await self._call(f"STREAM.UPDATE.{expected['name']}", update)
        return "updated"

    @staticmethod
    def _would_drop(expected: Config, found: Config) -> bool:
        size: int = expected["max_bytes"]
        holds: int = found["state"]["bytes"]
        return bool(expected["discard"] == "old") and 0 < size < holds

    async def _keep_first_results(self, found: Config) -> None:
        """Delete messages that were stored after the event of a request, in earlier versions.

        The update limits the stream to one message for each subject. The server would keep the last
        message, which may not be the event: in all versions the event is the first valid one.
        """
        stream, state = found["config"]["name"], found["state"]
        if state["messages"] == state.get("num_subjects", 0):
            return
        removed = 0
        for subject in await self._repeated_subjects(stream):
            *_, queue, request_id = subject.split(".")
            messages = await self._messages(stream, subject)
            first = next((m for m in messages if _is_result(m, queue, request_id)), None)
            for message in messages:
                if first is not None and message.sequence != first.sequence:
                    await self._call(f"STREAM.MSG.DELETE.{stream}", {"seq": message.sequence})
                    removed += 1
        log.warning("messages_after_results_removed", stream=stream, messages=removed)

    async def _repeated_subjects(self, stream: str) -> list[str]:
        """Return the subjects of a stream with more than one message."""
        repeated: list[str] = []
        offset = 0
        while True:
            query = {"subjects_filter": ">", "offset": offset}
            page = await self._call(f"STREAM.INFO.{stream}", query) or {}
            subjects = page.get("state", {}).get("subjects") or {}
            repeated += [subject for subject, count in subjects.items() if count > 1]
            offset += len(subjects)
            if not subjects or offset >= page.get("total", 0):
                return repeated

    async def _messages(self, stream: str, subject: str) -> list[StoredMessage]:
        messages: list[StoredMessage] = []
        sequence = 1
        while message := await self._read(stream, subject, sequence):
            messages.append(message)
            sequence = message.sequence + 1
        return messages

    async def _read(self, stream: str, subject: str, sequence: int) -> StoredMessage | None:
        try:
            return await read_message(self._bus, stream, subject=subject, sequence=sequence)
        except (Error, OSError) as error:
            raise BusUnavailable(f"NATS: {stream} cannot be read: {error}") from None

    async def _apply_consumer(self, stream: str, expected: Config, skipped: list[str]) -> Change:
        name = expected["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            await self._create_consumer(stream, name, expected)
            return "created"
        _refuse_push(name, found["config"])
        if expected["ack_wait"] < found["config"]["ack_wait"] and await self._workers_run():
            skipped.append(_shorter_lease(name, expected, found))
            expected["ack_wait"] = found["config"]["ack_wait"]
        if not _differences(expected, found["config"]):
            return "unchanged"
        await self._create_consumer(stream, name, {**found["config"], **expected})
        return "updated"

    async def _workers_run(self) -> bool:
        """Return whether a worker of the installation is connected.

        The server reports missing subscribers at once. A timeout means that a worker subscribes.
        """
        subject = self._subjects.interrupt(f"apply-{secrets.token_hex(16)}")
        try:
            await self._bus.client.request(subject, timeout=WORKER_TIMEOUT)
        except NoRespondersError:
            return False
        except (Error, OSError):
            return True
        return True

    async def _ensure_consumer(self, stream: str, expected: Config) -> Durable:
        name = expected["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            found = await self._create_consumer(stream, name, expected)
            log.info("consumer_created", stream=stream, consumer=name)
        return _durable(stream, expected, found["config"])

    async def _verify_consumer(self, stream: str, expected: Config) -> Durable:
        name = expected["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            raise TopologyError(
                f"stream {stream}: consumer {name} is missing; run `consumer apply`"
            )
        return _durable(stream, expected, found["config"])

    async def _create_consumer(self, stream: str, name: str, config: Config) -> Config:
        body = {"stream_name": stream, "config": config}
        created = await self._call(f"CONSUMER.CREATE.{stream}.{name}", body)
        if created is None:
            raise TopologyError(f"stream {stream}: it does not exist; run `consumer apply`")
        return created

    async def _call(self, subject: str, body: Config | None = None) -> Config | None:
        payload = b"" if body is None else json.dumps(body).encode()
        self._bus.last_error = ""
        try:
            async with self._bus.api_call(API_TIMEOUT):
                reply = await self._bus.client.request(
                    f"$JS.API.{subject}", payload, timeout=API_TIMEOUT
                )
        except NoRespondersError:
            raise BusUnavailable("NATS: JetStream is not enabled for this account") from None
        except TimeoutError:
            # The server drops a request without permission and reports the reason asynchronously.
            reason = self._bus.last_error or "no reply"
            missing = is_permission_error(reason)
            kind = BusMisconfigured if missing else BusUnavailable
            raise kind(f"NATS: $JS.API.{subject}: {reason}") from None
        except (Error, OSError) as problem:
            raise BusUnavailable(f"NATS: $JS.API.{subject}: {problem}") from None
        value: Config = json.loads(reply.data)
        error = value.get("error")
        if error is None:
            return value
        if error.get("err_code") in _NOT_FOUND:
            return None
        description = error.get("description", "refused")
        if error.get("code") == HTTPStatus.SERVICE_UNAVAILABLE:  # not enabled, or no leader yet
            raise BusUnavailable(f"NATS: {description}")
        kinds = {SUBJECTS_OVERLAP: _OverlapError, NO_STORAGE: _NoStorageError}
        raise kinds.get(error.get("err_code"), TopologyError)(f"{subject}: {description}")


def _family(subjects: Subjects) -> str:
    """Return the common prefix of the stream names of an installation."""
    return subjects.results_stream.removesuffix("RESULTS")


def _definition(name: str) -> str:
    packaged = files("consumer") / "infra" / "nats" / name
    if packaged.is_file():
        return packaged.read_text()
    # In a checkout, the files are outside of the package.
    return (Path(__file__).parents[2] / "infra" / "nats" / name).read_text()


def _shorter_lease(name: str, expected: Config, found: Config) -> str:
    shorter, longer = (c["ack_wait"] / NANOSECONDS for c in (expected, found["config"]))
    return (
        f"consumer {name}: ack_wait stays at {longer:g} s: workers run, with "
        f"{found['num_ack_pending']} deliveries in flight, and renew their leases too rarely for "
        f"{shorter:g} s; stop the workers first, or set CONSUMER_ACK_WAIT={longer:g}"
    )


def _is_result(message: StoredMessage, queue: str, request_id: str) -> bool:
    try:
        return event_of(message, queue, request_id) is not None
    except ResultUnreadable:
        return True


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _durable(stream: str, expected: Config, found: Config) -> Durable:
    name = expected["durable_name"]
    _refuse_push(name, found)
    _compare(f"consumer {name}", expected, found)
    return Durable(
        stream=stream,
        name=name,
        ack_wait=found["ack_wait"] / NANOSECONDS,
        max_ack_pending=found["max_ack_pending"],
        max_deliver=found.get("max_deliver") or -1,
    )


def _refuse_push(name: str, found: Config) -> None:
    if found.get("deliver_subject"):
        raise TopologyError(f"consumer {name}: it is a push consumer; delete it")


def _differences(expected: Config, found: Config) -> dict[str, tuple[Any, Any]]:
    # The server leaves out values that are zero, false or empty.
    different = {
        key: (found.get(key), value)
        for key, value in expected.items()
        if key != "metadata" and (found.get(key) or None) != (value or None)
    }
    declared = _declaration(expected)
    if declared.items() - _metadata(found).items():  # the server adds other keys
        different["metadata"] = (_metadata(found), declared)
    return different


def _metadata(config: Config) -> dict[str, str]:
    metadata: dict[str, str] = config.get("metadata") or {}
    return metadata


def _declaration(expected: Config) -> dict[str, str]:
    """Return the expected metadata of a queue, without the creator, which stays the first one."""
    return {key: text for key, text in _metadata(expected).items() if key != CREATED_BY_KEY}


def _require_same_task(expected: Config, found: Config) -> None:
    task, actual = _metadata(expected).get(TASK_KEY), _metadata(found).get(TASK_KEY)
    if task is not None and actual not in {None, task}:
        raise TopologyError(f"stream {expected['name']}: it is a queue of {actual}, not of {task}")


def _compare(what: str, expected: Config, found: Config) -> None:
    _require_same_task(expected, found)
    for key, (actual, required) in _differences(expected, found).items():
        # If the file has no max_age, the stream must have none: it deletes requests in progress.
        if key in _REQUIRED or (key == "max_age" and not required):
            raise TopologyError(
                f"{what}: {key} is {json.dumps(actual)} and must be {json.dumps(required)}; "
                "`consumer apply` changes it, or delete it where the server refuses"
            )
        log.warning("topology_differs", what=what, key=key, found=actual, expected=required)
