"""Streams and durable consumers, from the JSON files under infra/nats.

The files are in the server's own terms (`nats stream add --config FILE` reads them too). What
exists is compared with them key by key: `apply` updates with the full configuration, because a
partial one resets whatever it leaves out; `ensure` creates what is missing, refuses to start on
what would break the guarantees, and reports the rest. Neither is ever silent.
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

log = structlog.get_logger()

NANOSECONDS = 1_000_000_000
WORKERS_WITHIN = 0.2  # seconds; the server says at once when no worker is connected
_FILES = Subjects()  # what the files are written for
_STREAMS = (
    *(_FILES.requests_stream(task) for task in Task),
    _FILES.results_stream,
    _FILES.dead_letters_stream,
    _FILES.releases_stream,
    _FILES.retries_stream,
    _FILES.advisories_stream,
)
_NOT_FOUND = frozenset({STREAM_NOT_FOUND, CONSUMER_NOT_FOUND})

# A difference in one of these breaks a guarantee: requests lost or done twice, results not found.
_VITAL = frozenset(
    {"subjects", "retention", "discard", "storage", "allow_direct"}
    | {"max_msgs_per_subject", "discard_new_per_subject"}
    | {"filter_subjects", "filter_subject", "deliver_policy", "ack_policy", "backoff"}
)

# What a consumer must not have. The first entry of a backoff overrides ack_wait, and the lease with
# it; one filter beside the list of them is refused by the server.
_NOT_FOR_CONSUMERS: dict[str, Any] = {"backoff": [], "filter_subject": ""}
# Nor a list of filters, where the file has none: at each delivery the server compares it with every
# subject that waits, which is 25 ms of CPU with 50,000 requests and grows with their number.
_WITHOUT_FILTERS: dict[str, Any] = {"filter_subjects": []}

# The worker counts attempts and the server deliveries, with those that were requeued on purpose.
# The server's number is only for what kills a worker before it can count.
DELIVERIES_PER_ATTEMPT = 10
SIZES = {"default": 1, "small": 16}  # what max_bytes of the files are divided by

Change = Literal["created", "updated", "unchanged"]
Sizes = Literal["default", "small"]
Config = dict[str, Any]


class TopologyError(Unavailable):
    """A stream or consumer is not as it must be, or cannot be made so; one clear line."""


class _OverlapError(TopologyError):
    """Another stream stores what a new one is to store."""


class _NoStorageError(TopologyError):
    """The account or the server has not the storage that a stream reserves."""


class PartlyApplied(TopologyError):  # noqa: N818 - a state of what is left
    """Everything was applied but what would have harmed deliveries or messages that are there."""


@dataclass(frozen=True)
class Durable:
    """What the server really has for a durable consumer, whoever set it.

    Attributes:
        ack_wait: Seconds that a lease lasts.
        max_ack_pending: Deliveries in flight, over all workers.
        max_deliver: Deliveries of one message, with those that do not count as attempts; less
            than 1: without a limit.
    """

    stream: str
    name: str
    ack_wait: float
    max_ack_pending: int
    max_deliver: int

    @property
    def max_attempts(self) -> int:
        """How many attempts a request has, for all workers alike."""
        return max(1, self.max_deliver // DELIVERIES_PER_ATTEMPT)


class Topology:
    """The streams of one installation and the durables of its tasks.

    Args:
        bus: A connection.
        subjects: The root decides the names of streams and subjects.
        ack_wait: Seconds, for durables that are created or applied.
        max_ack_pending: For the same.
        max_deliver: For the same; None is the files'. What reaches it is put aside by the watcher.
        durable_name: Overrides the files' name of the durable, for one task.
        replicas: Servers of a cluster that each stream is kept on. None: the files' for a stream
            that is created; what exists stays as it is.
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
        self._replicas = replicas

    async def apply(self, tasks: tuple[Task, ...]) -> dict[str, Change]:
        """Create or update every stream and the tasks' durables.

        Returns:
            What was done, by name.

        Raises:
            TopologyError: The server refuses, or has not the storage; then nothing was created.
            PartlyApplied: Everything was applied but settings that would have shortened leases that
                run, or dropped stored messages.
            BusUnavailable: The server does not answer.
        """
        done: dict[str, Change] = {}
        left: list[str] = []
        streams = [
            (wanted, await self._call(f"STREAM.INFO.{wanted['name']}"))
            for wanted in self._streams()
        ]
        await self._require_storage(streams)
        for wanted, found in streams:
            done[wanted["name"]] = await self._apply_stream(wanted, found, left)
        for task in tasks:
            stream, wanted = self._subjects.requests_stream(task), self._consumer(task)
            done[wanted["durable_name"]] = await self._apply_consumer(stream, wanted, left)
            stream, wanted = self._subjects.retries_stream, self._retries(task)
            done[f"retries {task}"] = await self._apply_consumer(stream, wanted, left)
            stream, wanted = self._subjects.advisories_stream, self._watcher(task)
            name = f"watcher {wanted['durable_name']}"
            done[name] = await self._apply_consumer(stream, wanted, left)
        if left:
            raise PartlyApplied("; ".join(left))
        return done

    async def ensure(self, task: Task) -> Durable:
        """Create what is missing, and see that what exists can be worked with.

        Returns:
            The durable as the server has it: its `ack_wait` and `max_ack_pending` may have been set
            by `consumer apply` for more workers, and are left as they are.

        Raises:
            TopologyError: A stream or the durable would break a guarantee, or cannot be created.
            BusUnavailable: The server does not answer.
        """
        for wanted in self._streams():
            found = await self._call(f"STREAM.INFO.{wanted['name']}")
            if found is None:
                await self._create_stream(wanted)
                log.info("stream_created", stream=wanted["name"])
            else:
                self._compare_stream(wanted, found["config"])
        await self._ensure_consumer(self._subjects.advisories_stream, self._watcher(task))
        await self._ensure_consumer(self._subjects.retries_stream, self._retries(task))
        stream = self._subjects.requests_stream(task)
        return await self._ensure_consumer(stream, self._consumer(task))

    def watcher(self, task: Task) -> Durable:
        """The durable of the server's advisories about a task's durable, as `ensure` makes it."""
        wanted = self._watcher(task)
        return _durable(self._subjects.advisories_stream, wanted, wanted)

    def retries(self, task: Task) -> Durable:
        """The durable of a task's requests that wait for another attempt, as `ensure` makes it."""
        wanted = self._retries(task)
        return _durable(self._subjects.retries_stream, wanted, wanted)

    async def verify(self, task: Task) -> Durable:
        """Compare everything without changing anything, for `consumer check`.

        Raises:
            TopologyError: Something is missing or would break a guarantee.
            BusUnavailable: The server does not answer.
        """
        for wanted in self._streams():
            found = await self._call(f"STREAM.INFO.{wanted['name']}")
            if found is None:
                raise TopologyError(f"stream {wanted['name']}: missing; run `consumer apply`")
            self._compare_stream(wanted, found["config"])
        await self._verify_consumer(self._subjects.advisories_stream, self._watcher(task))
        await self._verify_consumer(self._subjects.retries_stream, self._retries(task))
        stream = self._subjects.requests_stream(task)
        return await self._verify_consumer(stream, self._consumer(task))

    def durables(self, own: Task) -> dict[Task, str]:
        """Names of the durables of all tasks: the own one as it is set, the others as in the files.

        What the workers of another task are set to is not known here.
        """
        usual = {task: self._rooted(f"consumers/{task}.json")["durable_name"] for task in Task}
        return {**usual, own: self._consumer(own)["durable_name"]}

    def _streams(self) -> list[Config]:
        configs = [self._rooted(f"streams/{stream}.json") for stream in _STREAMS]
        for config in configs:
            config["max_bytes"] //= SIZES[self._sizes]
            if self._replicas is not None:
                config["num_replicas"] = self._replicas
        return configs

    def _start_background_task(self, wanted: Config, found: Config) -> Config:
        """What is wanted of a stream that exists: its copies are its operator's, unless set."""
        if self._replicas is not None:
            return wanted
        return {**wanted, "num_replicas": found["num_replicas"]}

    def _compare_stream(self, wanted: Config, found: Config) -> None:
        _compare(f"stream {wanted['name']}", self._start_background_task(wanted, found), found)

    def _consumer(self, task: Task) -> Config:
        wanted = self._rooted(f"consumers/{task}.json")
        wanted["ack_wait"] = round(self._ack_wait * NANOSECONDS)
        wanted["max_ack_pending"] = self._max_ack_pending
        if self._max_deliver is not None:
            wanted["max_deliver"] = self._max_deliver
        return self._named(wanted)

    def _watcher(self, task: Task) -> Config:
        wanted = self._rooted(f"watchers/{task}.json")
        if self._durable_name is not None:
            wanted["filter_subjects"] = [
                subject.removesuffix(f".{task}") + f".{self._durable_name}"
                for subject in wanted["filter_subjects"]
            ]
        return self._named(wanted)

    def _retries(self, task: Task) -> Config:
        # Not under the durable's own name: a work queue has one consumer for each subject.
        wanted = self._rooted(f"retries/{task}.json")
        return {**wanted, "name": wanted["durable_name"], **_NOT_FOR_CONSUMERS}

    def _named(self, wanted: Config) -> Config:
        name = self._durable_name or wanted["durable_name"]
        named = {**wanted, "durable_name": name, "name": name}
        return {**_WITHOUT_FILTERS, **named, **_NOT_FOR_CONSUMERS}

    def _rooted(self, name: str) -> Config:
        config: Config = json.loads(_definition(name))
        if "name" in config:
            config["name"] = self._rooted_stream(config["name"])
        for key in ("subjects", "filter_subjects"):
            if key in config:
                config[key] = [self._rooted_subject(subject) for subject in config[key]]
        return config

    def _rooted_subject(self, subject: str) -> str:
        # The server's own subjects name the stream.
        named = self._rooted_stream(subject)
        return named.replace(f"{_FILES.root}.", f"{self._subjects.root}.", 1)

    def _rooted_stream(self, text: str) -> str:
        return text.replace(_family(_FILES), _family(self._subjects), 1)

    async def _require_storage(self, streams: list[tuple[Config, Config | None]]) -> None:
        """See that all streams find their storage, before any of them is created or updated.

        Raises:
            TopologyError: They do not.
        """
        needed, tier = 0, ""
        for wanted, found in streams:
            before = {} if found is None else found["config"]
            copies = (
                before["num_replicas"] if before and not self._replicas else wanted["num_replicas"]
            )
            tier = f"R{copies}"
            needed += wanted["max_bytes"] * copies
            needed -= max(0, before.get("max_bytes", 0)) * before.get("num_replicas", 1)
        if needed <= 0:
            return
        account = await self._call("INFO") or {}
        account = {**account, **account.get("tiers", {}).get(tier, {})}
        limit = account["limits"]["max_storage"]
        free = limit - max(account.get("reserved_storage", 0), account["storage"])
        if limit >= 0 and free < needed:
            raise self._no_storage(needed, f"the account has {_size(free)} left of {_size(limit)}")
        # The account may take what the server has not; in a cluster no single server needs it all.
        if not self._bus.clustered:
            await self._require_reservation(needed)

    async def _require_reservation(self, needed: int) -> None:
        # Only the server knows what it has left, and it says so by refusing a stream.
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

    async def _create_stream(self, wanted: Config) -> None:
        try:
            await self._call(f"STREAM.CREATE.{wanted['name']}", wanted)
        except _OverlapError as error:
            raise await self._explained(error, wanted["name"]) from None
        except _NoStorageError as error:
            raise TopologyError(
                f"{error}; it reserves {_size(wanted['max_bytes'])} for each copy, and "
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

    async def _apply_stream(self, wanted: Config, found: Config | None, left: list[str]) -> Change:
        if found is None:
            await self._create_stream(wanted)
            return "created"
        wanted = self._start_background_task(wanted, found["config"])
        if self._would_drop(wanted, found):
            left.append(
                f"stream {wanted['name']}: max_bytes stays at {_size(found['config']['max_bytes'])}"
                f": it holds {_size(found['state']['bytes'])}, and the oldest messages would be "
                "dropped; remove them first, or set NATS_STREAM_SIZES=default"
            )
            wanted["max_bytes"] = found["config"]["max_bytes"]
        if not _differences(wanted, found["config"]):
            return "unchanged"
        if wanted["name"] == self._subjects.results_stream:
            await self._keep_first_results(found)
        # What the files do not speak of stays as the operator has set it.
        await self._call(f"STREAM.UPDATE.{wanted['name']}", {**found["config"], **wanted})
        return "updated"

    @staticmethod
    def _would_drop(wanted: Config, found: Config) -> bool:
        size: int = wanted["max_bytes"]
        holds: int = found["state"]["bytes"]
        return bool(wanted["discard"] == "old") and 0 < size < holds

    async def _keep_first_results(self, found: Config) -> None:
        """Delete what an earlier version has stored after the event of a request.

        The stream is about to take one message for each subject, and the server would keep the
        last, which may be junk. The fence has kept the events of all versions from being second.
        """
        stream, state = found["config"]["name"], found["state"]
        if state["messages"] == state.get("num_subjects", 0):
            return
        removed = 0
        for subject in await self._crowded(stream):
            *_, task, request_id = subject.split(".")
            messages = await self._messages(stream, subject)
            first = next((m for m in messages if _is_result(m, task, request_id)), None)
            for message in messages:
                if first is not None and message.sequence != first.sequence:
                    await self._call(f"STREAM.MSG.DELETE.{stream}", {"seq": message.sequence})
                    removed += 1
        log.warning("messages_after_results_removed", stream=stream, messages=removed)

    async def _crowded(self, stream: str) -> list[str]:
        """The subjects of a stream with more than one message."""
        crowded: list[str] = []
        offset = 0
        while True:
            query = {"subjects_filter": ">", "offset": offset}
            page = await self._call(f"STREAM.INFO.{stream}", query) or {}
            subjects = page.get("state", {}).get("subjects") or {}
            crowded += [subject for subject, count in subjects.items() if count > 1]
            offset += len(subjects)
            if not subjects or offset >= page.get("total", 0):
                return crowded

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

    async def _apply_consumer(self, stream: str, wanted: Config, left: list[str]) -> Change:
        name = wanted["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            await self._create_consumer(stream, name, wanted)
            return "created"
        _refuse_push(name, found["config"])
        if wanted["ack_wait"] < found["config"]["ack_wait"] and await self._workers_run():
            left.append(_shorter_lease(name, wanted, found))
            wanted["ack_wait"] = found["config"]["ack_wait"]
        if not _differences(wanted, found["config"]):
            return "unchanged"
        await self._create_consumer(stream, name, {**found["config"], **wanted})
        return "updated"

    async def _workers_run(self) -> bool:
        """Whether a worker of the installation is connected; a busy one may not answer."""
        nothing = self._subjects.interrupt(f"apply-{secrets.token_hex(16)}")
        try:
            await self._bus.client.request(nothing, timeout=WORKERS_WITHIN)
        except NoRespondersError:
            return False
        except (Error, OSError):
            return True
        return True

    async def _ensure_consumer(self, stream: str, wanted: Config) -> Durable:
        name = wanted["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            found = await self._create_consumer(stream, name, wanted)
            log.info("consumer_created", stream=stream, consumer=name)
        return _durable(stream, wanted, found["config"])

    async def _verify_consumer(self, stream: str, wanted: Config) -> Durable:
        name = wanted["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            raise TopologyError(
                f"stream {stream}: consumer {name} is missing; run `consumer apply`"
            )
        return _durable(stream, wanted, found["config"])

    async def _create_consumer(self, stream: str, name: str, config: Config) -> Config:
        body = {"stream_name": stream, "config": config}
        made = await self._call(f"CONSUMER.CREATE.{stream}.{name}", body)
        if made is None:
            raise TopologyError(f"stream {stream}: it does not exist; run `consumer apply`")
        return made

    async def _call(self, subject: str, body: Config | None = None) -> Config | None:
        payload = b"" if body is None else json.dumps(body).encode()
        self._bus.last_error = ""
        try:
            async with self._bus.api_call(API_TIMEOUT):
                answer = await self._bus.client.request(
                    f"$JS.API.{subject}", payload, timeout=API_TIMEOUT
                )
        except NoRespondersError:
            raise BusUnavailable("NATS: JetStream is not enabled for this account") from None
        except TimeoutError:
            # The server drops what is not permitted; the reason goes to the error callback.
            reason = self._bus.last_error or "no answer"
            missing = is_permission_error(reason)
            kind = BusMisconfigured if missing else BusUnavailable
            raise kind(f"NATS: $JS.API.{subject}: {reason}") from None
        except (Error, OSError) as problem:
            raise BusUnavailable(f"NATS: $JS.API.{subject}: {problem}") from None
        value: Config = json.loads(answer.data)
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
    """What the names of all streams of an installation begin with."""
    return subjects.results_stream.removesuffix("RESULTS")


def _definition(name: str) -> str:
    packaged = files("consumer") / "infra" / "nats" / name
    if packaged.is_file():
        return packaged.read_text()
    # In a checkout the files are beside the package, not in it.
    return (Path(__file__).parents[2] / "infra" / "nats" / name).read_text()


def _shorter_lease(name: str, wanted: Config, found: Config) -> str:
    shorter, longer = (c["ack_wait"] / NANOSECONDS for c in (wanted, found["config"]))
    return (
        f"consumer {name}: ack_wait stays at {longer:g} s: workers run, with "
        f"{found['num_ack_pending']} deliveries in flight, and renew their leases too seldom for "
        f"{shorter:g} s; stop the workers first, or set CONSUMER_ACK_WAIT={longer:g}"
    )


def _is_result(message: StoredMessage, task: str, request_id: str) -> bool:
    try:
        return event_of(message, Task(task), request_id) is not None
    except ResultUnreadable:
        return True
    except ValueError:  # no task of this version
        return False


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _durable(stream: str, wanted: Config, found: Config) -> Durable:
    name = wanted["durable_name"]
    _refuse_push(name, found)
    _compare(f"consumer {name}", wanted, found)
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


def _differences(wanted: Config, found: Config) -> dict[str, tuple[Any, Any]]:
    # The server leaves out what is zero, false or empty.
    return {
        key: (found.get(key), value)
        for key, value in wanted.items()
        if (found.get(key) or None) != (value or None)
    }


def _compare(what: str, wanted: Config, found: Config) -> None:
    for key, (has, needs) in _differences(wanted, found).items():
        # Where the file wants no max_age: it deletes a message even while it is worked on.
        if key in _VITAL or (key == "max_age" and not needs):
            raise TopologyError(
                f"{what}: {key} is {json.dumps(has)} and must be {json.dumps(needs)}; "
                "`consumer apply` changes it, or delete it where the server refuses"
            )
        log.warning("topology_differs", what=what, key=key, found=has, wanted=needs)
