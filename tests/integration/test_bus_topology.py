"""Streams and durables on a real server: creation, updates, and refusals."""

import json
import shutil
import subprocess
import zipfile
from contextlib import AsyncExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.bus.connection import Bus, BusUnavailable
from consumer.bus.topology import Durable, PartlyApplied, Topology, TopologyError
from consumer.devstack import NatsServer, free_ports
from consumer.devstack.loopback import HOST
from consumer.devstack.process import find_program
from generation_contracts import Subjects, Task, encode
from generation_contracts.examples import EVENTS
from tests.conftest import StartNats
from tests.integration.bus_installation import (
    DEAD_LETTERS,
    OTHER_REQUESTS,
    REQUESTS,
    RESULTS,
    TASK,
    api,
    frozen,
    open_bus,
)

ROOT = Path(__file__).parents[2]
FORMER = "GENERATION_REQUESTS"  # the request stream of all tasks in earlier versions
RELEASES, ADVISORIES = "GENERATION_RELEASES", "GENERATION_ADVISORIES"
RETRIES = "GENERATION_RETRIES"
STREAMS = (REQUESTS, OTHER_REQUESTS, RESULTS, DEAD_LETTERS, RELEASES, RETRIES, ADVISORIES)
TASKS = ("text_to_image", "image_to_text")
QUEUES = {"text_to_image": REQUESTS, "image_to_text": OTHER_REQUESTS}
EVERYTHING = (
    *STREAMS,
    *TASKS,
    *(f"{what} {task}" for what in ("watcher", "retries") for task in TASKS),
)
BOTH = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT)
SECOND = 1_000_000_000  # nanoseconds


def topology(bus: Bus, root: str = "generation", **options: Any) -> Topology:
    return Topology(bus, Subjects(root), **{"ack_wait": 60.0, "max_ack_pending": 1, **options})


async def stream_config(bus: Bus, name: str) -> dict[str, Any]:
    config: dict[str, Any] = (await api(bus, f"STREAM.INFO.{name}"))["config"]
    return config


async def consumer_config(
    bus: Bus, name: str = "text_to_image", stream: str = REQUESTS
) -> dict[str, Any]:
    config: dict[str, Any] = (await api(bus, f"CONSUMER.INFO.{stream}.{name}"))["config"]
    return config


async def change_stream(bus: Bus, name: str, **changes: Any) -> None:
    await api(bus, f"STREAM.UPDATE.{name}", {**await stream_config(bus, name), **changes})


async def change_consumer(bus: Bus, **changes: Any) -> None:
    config = {**await consumer_config(bus), **changes}
    await api(
        bus,
        f"CONSUMER.CREATE.{REQUESTS}.text_to_image",
        {"stream_name": REQUESTS, "config": config},
    )


@pytest.fixture
async def parts() -> Any:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def bus(nats_server: NatsServer, parts: AsyncExitStack) -> Bus:
    return await open_bus(nats_server.url, parts)


# -- apply ----------------------------------------------------------------------------------------


async def test_a_second_apply_changes_nothing(bus: Bus) -> None:
    assert await topology(bus).apply(BOTH) == dict.fromkeys(EVERYTHING, "created")
    assert await topology(bus).apply(BOTH) == dict.fromkeys(EVERYTHING, "unchanged")


async def test_apply_creates_the_configurations_of_the_files(bus: Bus) -> None:
    await topology(bus, ack_wait=90.0, max_ack_pending=3).apply(BOTH)
    for path in (ROOT / "infra/nats/streams").glob("*.json"):
        expected = json.loads(path.read_text())
        found = await stream_config(bus, expected["name"])
        assert {key: found.get(key, 0) for key in expected} == expected
    for path in (ROOT / "infra/nats/consumers").glob("*.json"):
        expected = {
            **json.loads(path.read_text()),
            "ack_wait": 90 * SECOND,
            "max_ack_pending": 3,
        }
        found = await consumer_config(bus, path.stem, stream=QUEUES[path.stem])
        assert {key: found.get(key) for key in expected} == expected
    for folder, stream in (("watchers", ADVISORIES), ("retries", RETRIES)):
        for path in (ROOT / "infra/nats" / folder).glob("*.json"):
            expected = json.loads(path.read_text())
            found = await consumer_config(bus, expected["durable_name"], stream=stream)
            assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("ack_wait", [1.0, 1.1, 12.345, 60.0])
async def test_ack_wait_survives_the_conversion_to_nanoseconds(bus: Bus, ack_wait: float) -> None:
    applied = topology(bus, ack_wait=ack_wait)
    await applied.apply((TASK,))
    assert (await applied.apply((TASK,)))["text_to_image"] == "unchanged"
    assert (await applied.ensure(TASK)).ack_wait == ack_wait


async def test_apply_updates_a_durable_and_keeps_its_other_settings(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    await change_consumer(bus, sample_freq="100", metadata={"owner": "us"})

    done = await topology(bus, max_ack_pending=5, ack_wait=30.0).apply((TASK,))

    assert done["text_to_image"] == "updated"
    assert {done[name] for name in STREAMS} == {"unchanged"}
    found = await consumer_config(bus)
    assert (found["max_ack_pending"], found["ack_wait"]) == (5, 30 * SECOND)
    assert (found["max_waiting"], found["max_deliver"]) == (512, 30)
    assert found["sample_freq"] == "100"
    assert found["metadata"]["owner"] == "us"
    again = await topology(bus, max_ack_pending=5, ack_wait=30.0).apply((TASK,))
    assert set(again.values()) == {"unchanged"}


async def test_apply_resets_a_stream_to_its_file_and_keeps_its_other_settings(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    await change_stream(bus, REQUESTS, max_msgs=5, metadata={"owner": "us"}, compression="s2")

    done = await topology(bus).apply((TASK,))

    assert (done[REQUESTS], done[RESULTS]) == ("updated", "unchanged")
    found = await stream_config(bus, REQUESTS)
    assert found["max_msgs"] == 100_000
    assert (found["metadata"]["owner"], found["compression"]) == ("us", "s2")


async def test_extra_settings_of_an_operator_are_ignored(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    await change_stream(bus, RESULTS, metadata={"owner": "us"})
    await change_consumer(bus, metadata={"owner": "us"})
    assert set((await topology(bus).apply((TASK,))).values()) == {"unchanged"}
    with capture_logs() as logs:
        await topology(bus).ensure(TASK)
    assert logs == []


@pytest.mark.parametrize(
    "filters",
    [
        {"filter_subject": "generation.request.text_to_image"},
        {"filter_subjects": list(Subjects().request_subjects(TASK))},
    ],
    ids=["one subject", "both subjects"],
)
async def test_a_durable_with_filters_is_refused_and_apply_removes_the_filters(
    bus: Bus, filters: dict[str, Any]
) -> None:
    await topology(bus).apply(())
    config = {"durable_name": "text_to_image", "ack_policy": "explicit", **filters}
    await api(
        bus,
        f"CONSUMER.CREATE.{REQUESTS}.text_to_image",
        {"stream_name": REQUESTS, "config": config},
    )
    (name,) = filters
    with pytest.raises(TopologyError, match=f"consumer text_to_image: {name} is"):
        await topology(bus).ensure(TASK)
    with pytest.raises(TopologyError, match=f"consumer text_to_image: {name} is"):
        await topology(bus).verify(TASK)
    assert (await topology(bus).apply((TASK,)))["text_to_image"] == "updated"
    assert_unfiltered(await consumer_config(bus))
    await topology(bus).ensure(TASK)


def assert_unfiltered(durable: dict[str, Any]) -> None:
    """With a filter, the cost of a delivery grows with the queue (tests/bench/speed)."""
    assert not durable.get("filter_subject")
    assert not durable.get("filter_subjects")


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("retention", "limits"), ("storage", "memory")])
async def test_a_setting_that_no_update_can_change_is_refused_by_name(
    bus: Bus, key: str, value: str
) -> None:
    config = json.loads((ROOT / f"infra/nats/streams/{REQUESTS}.json").read_text())
    await api(bus, f"STREAM.CREATE.{REQUESTS}", {**config, key: value})

    with pytest.raises(TopologyError, match=f"stream {REQUESTS}: {key} is") as ensured:
        await topology(bus).ensure(TASK)
    assert f'"{value}"' in str(ensured.value)
    assert f'"{config[key]}"' in str(ensured.value)
    with pytest.raises(TopologyError, match=f"STREAM.UPDATE.{REQUESTS}: .*{key}"):
        await topology(bus).apply((TASK,))
    assert (await stream_config(bus, REQUESTS))[key] == value


@pytest.mark.parametrize(
    ("stream", "key", "value"),
    [
        (REQUESTS, "discard", "old"),
        (REQUESTS, "max_age", 3_600 * SECOND),
        (RESULTS, "allow_direct", True),
        (RESULTS, "max_msgs_per_subject", 2),
        (RELEASES, "discard_new_per_subject", False),
        (RESULTS, "subjects", ["generation.result.text_to_image.*"]),
    ],
)
async def test_ensure_refuses_a_stream_that_breaks_a_guarantee(
    bus: Bus, stream: str, key: str, value: object
) -> None:
    await topology(bus).apply((TASK,))
    await change_stream(bus, stream, **{key: value})
    with pytest.raises(TopologyError, match=f"stream {stream}: {key} is"):
        await topology(bus).ensure(TASK)
    with pytest.raises(TopologyError, match=f"stream {stream}: {key} is"):
        await topology(bus).verify(TASK)
    assert (await topology(bus).apply((TASK,)))[stream] == "updated"
    await topology(bus).ensure(TASK)


async def test_a_durable_with_a_backoff_is_refused_and_apply_removes_the_backoff(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    await change_consumer(bus, backoff=[SECOND, 5 * SECOND])
    with pytest.raises(TopologyError, match="consumer text_to_image: backoff is"):
        await topology(bus).ensure(TASK)
    assert (await topology(bus).apply((TASK,)))["text_to_image"] == "updated"
    found = await consumer_config(bus)
    assert not found.get("backoff")
    assert found["ack_wait"] == 60 * SECOND


async def test_another_max_deliver_is_logged_and_apply_updates_it(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    await change_consumer(bus, max_deliver=3)
    with capture_logs() as logs:
        await topology(bus).ensure(TASK)
    assert [(entry["key"], entry["found"], entry["expected"]) for entry in logs] == [
        ("max_deliver", 3, 30)
    ]
    assert (await topology(bus, max_deliver=50).apply((TASK,)))["text_to_image"] == "updated"
    assert (await consumer_config(bus))["max_deliver"] == 50


async def test_a_watcher_gets_the_advisories_of_its_durable_only(bus: Bus) -> None:
    await topology(bus, durable_name="mine").apply((TASK,))
    await topology(bus).apply((Task.IMAGE_TO_TEXT,))
    advisories = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
    for queue, durable in ((REQUESTS, "mine"), (OTHER_REQUESTS, "image_to_text")):
        found = await consumer_config(bus, durable, stream=ADVISORIES)
        assert found["filter_subjects"] == [f"{advisories}.{queue}.{durable}"]
        assert found["max_deliver"] == -1
    expected = topology(bus, durable_name="mine").watcher(TASK)
    assert expected == Durable(
        stream=ADVISORIES, name="mine", ack_wait=30.0, max_ack_pending=1, max_deliver=-1
    )


async def test_a_push_consumer_is_refused(bus: Bus) -> None:
    await topology(bus).apply(())
    definition = json.loads((ROOT / "infra/nats/consumers/text_to_image.json").read_text())
    del definition["max_waiting"]
    await api(
        bus,
        f"CONSUMER.CREATE.{REQUESTS}.text_to_image",
        {
            "stream_name": REQUESTS,
            "config": {**definition, "deliver_subject": "somewhere"},
        },
    )
    with pytest.raises(TopologyError, match="consumer text_to_image: it is a push consumer"):
        await topology(bus).ensure(TASK)
    with pytest.raises(TopologyError, match="consumer text_to_image: it is a push consumer"):
        await topology(bus).apply((TASK,))


async def test_a_second_durable_of_a_task_is_refused(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    with pytest.raises(TopologyError, match="multiple non-filtered consumers not allowed"):
        await topology(bus, durable_name="second").ensure(TASK)


# -- existing work is not harmed ------------------------------------------------------------------


async def in_flight(bus: Bus) -> None:
    """Deliver a request to a client that does not settle it."""
    await bus.jetstream.publish("generation.request.text_to_image.r-1", b"{}")
    inbox = bus.client.new_inbox()
    subscription = await bus.client.subscribe(inbox)
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.text_to_image"
    await bus.client.publish(pull, b"", reply=inbox)
    await subscription.next_msg(timeout=5)


@pytest.mark.parametrize("idle", [False, True])
async def test_apply_does_not_shorten_leases_while_workers_run(bus: Bus, idle: bool) -> None:
    """Running workers renew their leases for the old value of ack_wait.

    Apply updates the other settings, and its error names the setting to change.
    """
    await topology(bus, ack_wait=300.0).apply((TASK,))
    await bus.client.subscribe("generation.interrupt.*")  # as a worker does
    if not idle:
        await in_flight(bus)
    with pytest.raises(PartlyApplied, match=r"ack_wait stays at 300 s.*CONSUMER_ACK_WAIT=300"):
        await topology(bus, ack_wait=60.0, max_ack_pending=7).apply((TASK,))
    found = await consumer_config(bus)
    assert (found["ack_wait"], found["max_ack_pending"]) == (300 * SECOND, 7)
    longer = await topology(bus, ack_wait=400.0, max_ack_pending=7).apply((TASK,))
    assert longer["text_to_image"] == "updated", "a longer ack_wait is harmless"


async def test_apply_shortens_leases_while_no_worker_runs(bus: Bus) -> None:
    """A request of a dead worker may still be in flight."""
    await topology(bus, ack_wait=300.0).apply((TASK,))
    await in_flight(bus)
    assert (await topology(bus, ack_wait=60.0).apply((TASK,)))["text_to_image"] == "updated"
    assert (await consumer_config(bus))["ack_wait"] == 60 * SECOND


async def test_apply_does_not_shrink_a_stream_below_its_dead_letters(bus: Bus) -> None:
    await topology(bus).apply((TASK,))
    await bus.jetstream.publish("generation.dead.text_to_image", b"x" * 1000)
    config = await stream_config(bus, DEAD_LETTERS)
    tiny = topology(bus)
    tiny._streams = lambda: [{**config, "max_bytes": 500}]  # type: ignore[method-assign]
    with pytest.raises(PartlyApplied, match=f"stream {DEAD_LETTERS}: max_bytes stays"):
        await tiny.apply(())
    assert (await api(bus, f"STREAM.INFO.{DEAD_LETTERS}"))["state"]["messages"] == 1


# -- streams of earlier versions ------------------------------------------------------------------


async def test_apply_updates_the_streams_of_an_earlier_version_and_keeps_the_real_results(
    bus: Bus,
) -> None:
    """The server itself would keep the last message of each subject, which may be foreign."""
    await topology(bus).apply((TASK,))
    for name in STREAMS:
        changes: dict[str, Any] = {"allow_direct": True}
        if name in {RESULTS, RELEASES}:
            changes |= {"discard": "old", "discard_new_per_subject": False}
            changes["max_msgs_per_subject"] = -1
        await change_stream(bus, name, **changes)
    event = EVENTS["succeeded_image"]
    real = encode(event)
    subject = f"generation.result.text_to_image.{event.request_id}"
    later = b'{"type":"generation.v9.done","request_id":"l-1","task":"text_to_image"}'
    for name, bodies in {
        subject: (b"junk", real, b'{"stream":"x","seq":1}', b""),
        "generation.result.text_to_image.l-1": (later, b"junk"),
        "generation.result.text_to_image.one": (b"foreign",),
        "generation.result.other": (b"1", b"2"),
    }.items():
        for body in bodies:
            await bus.jetstream.publish(name, body)

    with pytest.raises(TopologyError, match="consumer apply"):
        await topology(bus).ensure(TASK)
    assert (await topology(bus).apply((TASK,)))[RESULTS] == "updated"
    await topology(bus).ensure(TASK)
    assert (await bus.jetstream.get_last_msg(RESULTS, subject)).data == real
    kept = await bus.jetstream.get_last_msg(RESULTS, "generation.result.text_to_image.l-1")
    assert kept.data == later
    state = (await api(bus, f"STREAM.INFO.{RESULTS}"))["state"]
    assert state["messages"] == state["num_subjects"] == 4
    assert set((await topology(bus).apply((TASK,))).values()) == {"unchanged"}


# -- storage --------------------------------------------------------------------------------------

LIMITED = (
    "accounts {{ A {{ jetstream: {{ max_file: {0} }}, users: [{{user: u, password: p}}] }} }}",
    "jetstream {{ store_dir: jetstream, max_file_store: {0} }}",
)


@pytest.mark.parametrize("config", LIMITED, ids=["account", "server"])
async def test_apply_creates_nothing_if_the_storage_is_too_small(
    start_nats: StartNats, parts: AsyncExitStack, config: str
) -> None:
    server = start_nats(config.format("2G"))
    bus = await open_bus(server.url.replace("//", "//u:p@"), parts)
    message = r"reserve 7\.38 GiB and .*nothing was created: set NATS_STREAM_SIZES=small"
    with pytest.raises(TopologyError, match=message):
        await topology(bus).apply(BOTH)
    assert (await api(bus, "STREAM.NAMES"))["streams"] is None


@pytest.mark.parametrize("config", LIMITED, ids=["account", "server"])
async def test_small_streams_fit_into_one_gibibyte(
    start_nats: StartNats, parts: AsyncExitStack, config: str
) -> None:
    server = start_nats(config.format("1G"))
    bus = await open_bus(server.url.replace("//", "//u:p@"), parts)
    small = topology(bus, sizes="small")
    assert set((await small.apply(BOTH)).values()) == {"created"}
    assert set((await small.apply(BOTH)).values()) == {"unchanged"}
    await small.ensure(TASK)
    reserved = sum([(await stream_config(bus, name))["max_bytes"] for name in STREAMS])
    assert reserved < 2**30
    with pytest.raises(TopologyError, match="nothing was created"):
        await topology(bus).apply(BOTH)
    assert (await stream_config(bus, RESULTS))["max_bytes"] == 2**28


# -- ensure ---------------------------------------------------------------------------------------


async def test_ensure_creates_missing_streams_and_the_durable(bus: Bus) -> None:
    found = await topology(bus, ack_wait=12.5, max_ack_pending=2).ensure(TASK)
    assert found == Durable(
        stream=REQUESTS, name="text_to_image", ack_wait=12.5, max_ack_pending=2, max_deliver=30
    )
    assert found.max_attempts == 3
    for name in STREAMS:
        assert (await stream_config(bus, name))["name"] == name


async def test_ensure_keeps_and_logs_settings_that_differ(bus: Bus) -> None:
    await topology(bus, ack_wait=25.0, max_ack_pending=8).apply((TASK,))
    with capture_logs() as logs:
        found = await topology(bus, ack_wait=60.0, max_ack_pending=1).ensure(TASK)
    assert (found.ack_wait, found.max_ack_pending) == (25.0, 8)
    config = await consumer_config(bus)
    assert (config["ack_wait"], config["max_ack_pending"]) == (25 * SECOND, 8)
    assert {entry["key"] for entry in logs} == {"ack_wait", "max_ack_pending"}


async def test_verify_changes_nothing(bus: Bus) -> None:
    with pytest.raises(TopologyError, match=f"stream {REQUESTS}: missing"):
        await topology(bus).verify(TASK)
    await topology(bus).apply(())
    with pytest.raises(TopologyError, match="consumer text_to_image is missing"):
        await topology(bus).verify(TASK)
    await topology(bus).apply((TASK,))
    assert await topology(bus).verify(TASK) == await topology(bus).ensure(TASK)


async def test_each_subject_root_has_separate_streams(bus: Bus) -> None:
    await topology(bus).apply(BOTH)
    done = await topology(bus, "team.a").apply(BOTH)
    assert done == {name.replace("GENERATION", "TEAM_A"): "created" for name in EVERYTHING}
    queues = {str(task): Subjects("team.a").requests_stream(task) for task in BOTH}
    for task, queue in queues.items():
        found = (await stream_config(bus, queue))["subjects"]
        assert found == [f"team.a.request.{task}", f"team.a.request.{task}.*"]
    advisories = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
    assert (await stream_config(bus, "TEAM_A_ADVISORIES"))["subjects"] == [
        f"{advisories}.{queue}.*" for queue in queues.values()
    ]
    for task, queue in queues.items():
        watcher = await consumer_config(bus, task, stream="TEAM_A_ADVISORIES")
        assert watcher["filter_subjects"] == [f"{advisories}.{queue}.{task}"]
    assert (await stream_config(bus, "TEAM_A_RELEASES"))["subjects"] == [
        "team.a.released.>",
        "team.a.withdrawn.>",
    ]
    assert set((await topology(bus).apply(BOTH)).values()) == {"unchanged"}


async def test_each_task_has_a_separate_stream_and_a_durable_without_a_filter(bus: Bus) -> None:
    await topology(bus).apply(BOTH)
    for task in BOTH:
        queue = Subjects().requests_stream(task)
        found = await stream_config(bus, queue)
        assert found["subjects"] == list(Subjects().request_subjects(task))
        assert (found["retention"], found["discard"]) == ("workqueue", "new")
        assert_unfiltered(await consumer_config(bus, str(task), stream=queue))


# -- the one stream of earlier versions -----------------------------------------------------------


async def make_earlier_version(bus: Bus) -> None:
    """Create one request stream for all tasks, durables with filters, and the advisory stream."""
    settings = {"subjects": ["generation.request.>"], "retention": "workqueue"}
    await api(bus, f"STREAM.CREATE.{FORMER}", {"name": FORMER, **settings})
    advisories = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{FORMER}"
    config = json.loads((ROOT / f"infra/nats/streams/{ADVISORIES}.json").read_text())
    await api(bus, f"STREAM.CREATE.{ADVISORIES}", {**config, "subjects": [f"{advisories}.*"]})
    for task in BOTH:
        durable = {"durable_name": str(task), "ack_policy": "explicit"}
        for stream, filters in (
            (FORMER, list(Subjects().request_subjects(task))),
            (ADVISORIES, [f"{advisories}.{task}"]),
        ):
            body = {"stream_name": stream, "config": {**durable, "filter_subjects": filters}}
            await api(bus, f"CONSUMER.CREATE.{stream}.{task}", body)


async def test_the_stream_of_an_earlier_version_is_reported_and_not_changed(bus: Bus) -> None:
    await make_earlier_version(bus)
    await bus.jetstream.publish("generation.request.text_to_image", b"{}")
    line = (
        "stream GENERATION_REQUESTS_TEXT_TO_IMAGE: GENERATION_REQUESTS, the request stream of an "
        "earlier version, stores its subjects (requests in it: 1); let the earlier workers "
        "empty it, then delete it (`nats stream rm GENERATION_REQUESTS`)"
    )
    with pytest.raises(TopologyError) as applied:
        await topology(bus).apply(BOTH)
    with pytest.raises(TopologyError) as ensured:
        await topology(bus).ensure(TASK)
    assert str(applied.value) == str(ensured.value) == line
    assert (await api(bus, f"STREAM.INFO.{FORMER}"))["state"]["messages"] == 1
    assert (await api(bus, "STREAM.NAMES"))["total"] == 2


async def test_apply_upgrades_an_installation_after_the_old_stream_is_deleted(
    bus: Bus,
) -> None:
    await make_earlier_version(bus)
    await api(bus, f"STREAM.DELETE.{FORMER}")
    done = await topology(bus).apply(BOTH)
    assert (done[OTHER_REQUESTS], done["image_to_text"]) == ("created", "created")
    assert (done[ADVISORIES], done["watcher image_to_text"]) == ("updated", "updated")
    await topology(bus).ensure(TASK)


async def test_another_stream_with_overlapping_subjects_is_reported(bus: Bus) -> None:
    stranger = {"name": "STRANGER", "subjects": ["generation.request.image_to_text"]}
    await api(bus, "STREAM.CREATE.STRANGER", stranger)
    with pytest.raises(TopologyError, match=f"STREAM.CREATE.{OTHER_REQUESTS}: subjects overlap"):
        await topology(bus).apply(BOTH)


async def test_the_name_of_the_durable_is_configurable(bus: Bus) -> None:
    named = topology(bus, durable_name="blue")
    assert (await named.apply((TASK,)))["blue"] == "created"
    assert (await named.apply((TASK,)))["blue"] == "unchanged"
    assert (await named.ensure(TASK)).name == "blue"
    assert (await consumer_config(bus, "blue"))["durable_name"] == "blue"


# -- unsuitable servers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    ['accounts { PLAIN { users: [{user: "u", password: "p"}] } }', "jetstream: disabled"],
    ids=["account", "server"],
)
async def test_missing_jetstream_is_reported(
    start_nats: StartNats, parts: AsyncExitStack, config: str
) -> None:
    server = start_nats(config)
    bus = await open_bus(server.url.replace("//", "//u:p@"), parts)
    with pytest.raises(BusUnavailable, match=r"JetStream (is )?not enabled"):
        await topology(bus).apply((TASK,))
    with pytest.raises(BusUnavailable, match=r"JetStream (is )?not enabled"):
        await topology(bus).ensure(TASK)


async def test_a_missing_permission_is_reported_with_the_subject(
    start_nats: StartNats, parts: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.bus.topology.API_TIMEOUT", 0.5)
    server = start_nats(
        """
        accounts { A { jetstream: enabled, users: [{
          user: "u", password: "p",
          permissions: { publish: { deny: ["$JS.API.STREAM.CREATE.>"] } }
        }] } }
        """
    )
    bus = await open_bus(server.url.replace("//", "//u:p@"), parts)
    with pytest.raises(BusUnavailable, match=r"STREAM.CREATE.*[Pp]ermissions"):
        await topology(bus).apply((TASK,))


async def test_a_server_that_is_down_is_reported(
    bus: Bus, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.bus.topology.API_TIMEOUT", 0.2)
    nats_server.kill()
    with pytest.raises(BusUnavailable, match=r"STREAM.INFO"):
        await topology(bus).ensure(TASK)


async def test_an_old_error_is_not_reported_as_the_reason(
    bus: Bus, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.bus.topology.API_TIMEOUT", 0.2)
    bus.last_error = "an earlier error"
    with frozen(nats_server), pytest.raises(BusUnavailable, match=r"STREAM.INFO.*no reply"):
        await topology(bus).ensure(TASK)


# -- the files ------------------------------------------------------------------------------------


async def test_the_server_accepts_the_files_unchanged(bus: Bus) -> None:
    """Send the files as `nats stream add --config FILE` and `nats consumer add` do."""
    for path in sorted((ROOT / "infra/nats/streams").glob("*.json")):
        config = json.loads(path.read_text())
        assert path.stem == config["name"]
        await api(bus, f"STREAM.CREATE.{config['name']}", config)
    for folder, shared in (("consumers", None), ("watchers", ADVISORIES), ("retries", RETRIES)):
        for path in sorted((ROOT / "infra/nats" / folder).glob("*.json")):
            config = json.loads(path.read_text())
            assert path.stem == config["durable_name"]
            stream = shared or QUEUES[path.stem]
            await api(
                bus,
                f"CONSUMER.DURABLE.CREATE.{stream}.{config['durable_name']}",
                {"stream_name": stream, "config": config},
            )
    assert set((await topology(bus).apply(BOTH)).values()) == {"unchanged"}


def test_the_server_accepts_its_configuration_file() -> None:
    subprocess.run(
        [find_program("nats-server"), "-t", "-c", ROOT / "infra/nats/server.conf"],
        check=True,
        capture_output=True,
        timeout=10,
    )


def test_the_configuration_file_stores_streams_in_the_working_folder(tmp_path: Path) -> None:
    shutil.copy(ROOT / "infra/nats/server.conf", tmp_path)
    client, monitoring = free_ports(2)
    (tmp_path / "test.conf").write_text(
        f'include "server.conf"\nhost: {HOST}\nport: {client}\nhttp: "{HOST}:{monitoring}"\n'
    )
    with subprocess.Popen(
        [find_program("nats-server"), "-c", "test.conf"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        log = list(takewhile(lambda line: "Server is ready" not in line, server.stderr))
        server.terminate()
    (stored,) = [line for line in log if "Store Directory" in line]
    assert '"jetstream/jetstream"' in stored, stored
    assert (tmp_path / "jetstream" / "jetstream").is_dir()


def test_the_wheel_contains_the_files(tmp_path: Path) -> None:
    subprocess.run(
        ["uv", "build", "--package", "generation-consumer", "--wheel", "-o", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (wheel,) = tmp_path.glob("generation_consumer-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        for path in (ROOT / "infra/nats").rglob("*.*"):
            name = f"consumer/{path.relative_to(ROOT)}"
            assert packed.read(name) == path.read_bytes()


async def test_replicas_are_refused_by_a_single_server(
    bus: Bus,
) -> None:
    with pytest.raises((TopologyError, BusUnavailable), match=r"replicas|insufficient"):
        await topology(bus, replicas=3).apply(BOTH)


async def test_existing_replicas_are_kept_unless_a_number_is_set() -> None:
    """With the answer of a server as data, because a single server makes no replicas."""
    found = {"num_replicas": 3, "name": REQUESTS}
    expected = {"num_replicas": 1, "name": REQUESTS}
    without, one = (
        Topology(Bus(), Subjects(), ack_wait=60.0, max_ack_pending=1, replicas=replicas)
        for replicas in (None, 1)
    )
    assert without._with_current_replicas(expected, found)["num_replicas"] == 3
    assert one._with_current_replicas(expected, found)["num_replicas"] == 1
