"""Streams and durable consumers, from the JSON files under infra/nats.

The files are in the server's own terms (`nats stream add --config FILE` reads them too). What
exists is compared with them key by key: `apply` updates with the full configuration, because a
partial one resets whatever it leaves out; `ensure` creates what is missing, refuses to start on
what would break the guarantees, and reports the rest. Neither is ever silent.
"""

import json
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import structlog
from nats.errors import Error, NoRespondersError

from consumer.bus.codes import CONSUMER_NOT_FOUND, STREAM_NOT_FOUND, SUBJECTS_OVERLAP
from consumer.bus.connection import API_TIMEOUT, Bus, BusMisconfigured, BusUnavailable
from consumer.ports import Unavailable
from generation_contracts import Subjects, Task

log = structlog.get_logger()

NANOSECONDS = 1_000_000_000
_FILES = Subjects()  # what the files are written for
_STREAMS = (
    *(_FILES.requests_stream(task) for task in Task),
    _FILES.results_stream,
    _FILES.dead_letters_stream,
    _FILES.releases_stream,
    _FILES.advisories_stream,
)
_NOT_FOUND = frozenset({STREAM_NOT_FOUND, CONSUMER_NOT_FOUND})

# A difference in one of these breaks a guarantee: requests lost or done twice, results not found.
_VITAL = frozenset(
    {"subjects", "retention", "discard", "storage", "allow_direct"}
    | {"filter_subjects", "filter_subject", "deliver_policy", "ack_policy", "backoff"}
)

# What a consumer must not have. The first entry of a backoff overrides ack_wait, and the lease with
# it; one filter beside the list of them is refused by the server.
_NOT_FOR_CONSUMERS: dict[str, Any] = {"backoff": [], "filter_subject": ""}
# Nor a list of filters, where the file has none: at each delivery the server compares it with every
# subject that waits, which is 25 ms of CPU with 50,000 requests and grows with their number.
_WITHOUT_FILTERS: dict[str, Any] = {"filter_subjects": []}

Change = Literal["created", "updated", "unchanged"]
Config = dict[str, Any]


class TopologyError(Unavailable):
    """A stream or consumer is not as it must be, or cannot be made so; one clear line."""


class _OverlapError(TopologyError):
    """Another stream stores what a new one is to store."""


@dataclass(frozen=True)
class Durable:
    """What the server really has for a durable consumer, whoever set it.

    Attributes:
        ack_wait: Seconds that a lease lasts.
        max_ack_pending: Deliveries in flight, over all workers.
    """

    stream: str
    name: str
    ack_wait: float
    max_ack_pending: int


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
    ) -> None:
        self._bus = bus
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
            TopologyError: The server refuses.
            BusUnavailable: The server does not answer.
        """
        done: dict[str, Change] = {}
        for wanted in self._streams():
            done[wanted["name"]] = await self._apply_stream(wanted)
        for task in tasks:
            stream, wanted = self._subjects.requests_stream(task), self._consumer(task)
            done[wanted["durable_name"]] = await self._apply_consumer(stream, wanted)
            stream, wanted = self._subjects.advisories_stream, self._watcher(task)
            done[f"watcher {wanted['durable_name']}"] = await self._apply_consumer(stream, wanted)
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
        stream = self._subjects.requests_stream(task)
        return await self._ensure_consumer(stream, self._consumer(task))

    def watcher(self, task: Task) -> Durable:
        """The durable of the server's advisories about a task's durable, as `ensure` makes it."""
        wanted = self._watcher(task)
        return _durable(self._subjects.advisories_stream, wanted, wanted)

    async def look(self, task: Task) -> Durable:
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
        await self._look_at_consumer(self._subjects.advisories_stream, self._watcher(task))
        stream = self._subjects.requests_stream(task)
        return await self._look_at_consumer(stream, self._consumer(task))

    def durables(self, own: Task) -> dict[Task, str]:
        """Names of the durables of all tasks: the own one as it is set, the others as in the files.

        What the workers of another task are set to is not known here.
        """
        usual = {task: self._rooted(f"consumers/{task}.json")["durable_name"] for task in Task}
        return {**usual, own: self._consumer(own)["durable_name"]}

    def _streams(self) -> list[Config]:
        configs = [self._rooted(f"streams/{stream}.json") for stream in _STREAMS]
        if self._replicas is not None:
            configs = [{**config, "num_replicas": self._replicas} for config in configs]
        return configs

    def _beside(self, wanted: Config, found: Config) -> Config:
        """What is wanted of a stream that exists: its copies are its operator's, unless set."""
        if self._replicas is not None:
            return wanted
        return {**wanted, "num_replicas": found["num_replicas"]}

    def _compare_stream(self, wanted: Config, found: Config) -> None:
        _compare(f"stream {wanted['name']}", self._beside(wanted, found), found)

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

    async def _create_stream(self, wanted: Config) -> None:
        try:
            await self._call(f"STREAM.CREATE.{wanted['name']}", wanted)
        except _OverlapError as error:
            raise await self._explained(error, wanted["name"]) from None

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

    async def _apply_stream(self, wanted: Config) -> Change:
        found = await self._call(f"STREAM.INFO.{wanted['name']}")
        if found is None:
            await self._create_stream(wanted)
            return "created"
        wanted = self._beside(wanted, found["config"])
        if not _differences(wanted, found["config"]):
            return "unchanged"
        # What the files do not speak of stays as the operator has set it.
        await self._call(f"STREAM.UPDATE.{wanted['name']}", {**found["config"], **wanted})
        return "updated"

    async def _apply_consumer(self, stream: str, wanted: Config) -> Change:
        name = wanted["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is not None:
            _refuse_push(name, found["config"])
            if not _differences(wanted, found["config"]):
                return "unchanged"
        config = wanted if found is None else {**found["config"], **wanted}
        await self._create_consumer(stream, name, config)
        return "created" if found is None else "updated"

    async def _ensure_consumer(self, stream: str, wanted: Config) -> Durable:
        name = wanted["durable_name"]
        found = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if found is None:
            found = await self._create_consumer(stream, name, wanted)
            log.info("consumer_created", stream=stream, consumer=name)
        return _durable(stream, wanted, found["config"])

    async def _look_at_consumer(self, stream: str, wanted: Config) -> Durable:
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
            async with self._bus.question(API_TIMEOUT):
                answer = await self._bus.client.request(
                    f"$JS.API.{subject}", payload, timeout=API_TIMEOUT
                )
        except NoRespondersError:
            raise BusUnavailable("NATS: JetStream is not enabled for this account") from None
        except TimeoutError:
            # The server drops what is not permitted; the reason goes to the error callback.
            reason = self._bus.last_error or "no answer"
            certain = "permissions violation" in reason.lower()
            kind = BusMisconfigured if certain else BusUnavailable
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
        refusal = _OverlapError if error.get("err_code") == SUBJECTS_OVERLAP else TopologyError
        raise refusal(f"{subject}: {description}")


def _family(subjects: Subjects) -> str:
    """What the names of all streams of an installation begin with."""
    return subjects.results_stream.removesuffix("RESULTS")


def _definition(name: str) -> str:
    packaged = files("consumer") / "infra" / "nats" / name
    if packaged.is_file():
        return packaged.read_text()
    # In a checkout the files are beside the package, not in it.
    return (Path(__file__).parents[2] / "infra" / "nats" / name).read_text()


def _durable(stream: str, wanted: Config, found: Config) -> Durable:
    name = wanted["durable_name"]
    _refuse_push(name, found)
    _compare(f"consumer {name}", wanted, found)
    return Durable(
        stream=stream,
        name=name,
        ack_wait=found["ack_wait"] / NANOSECONDS,
        max_ack_pending=found["max_ack_pending"],
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
