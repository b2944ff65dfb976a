"""Every attack on other senders' requests, one function each, by its name.

`await make("call_refused_at_foreign_subjects", attacker)` makes one of them; a test that has a
request running says so with `attacker.running[Id(task, request_id)] = None`, or lets the attacker
read it from the progress. No attack cancels a request of another sender, or uses an id before its
owner has published it: ids are capabilities, and a sender that knows one may do both.
"""

import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from generation_contracts import Task, headers
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.headers import MESSAGE_ID, REPLY_TO
from tests.hostile.attacker import Attacker, NoTarget
from tests.soak.fates import Fate, seed_with

Attack = Callable[[Attacker], Awaitable[None]]

ATTACKS: dict[str, Attack] = {}

IMAGE, TEXT = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT
BAD = b'{"prompt": 1}'
STORM = 300  # cancellations at once
FAT = 1_000_000  # bytes of one request; the stream takes 1,040,384
# Legal in a subject for the server, and not for every client: white space of regular expressions,
# other control characters, bytes that are not UTF-8, and a line separator.
STRANGE = (
    *(b"\x0b", b"\x0c", b"\x01", b"\x1b", b"\x7f"),
    *(b"\x85", b"\xff", b"\xc3", "\u2028".encode()),
)
# Characters: the server takes protocol lines of 4,096 bytes from a sender, and sends longer ones.
LONG = 3_500
LONGEST = 4_010
FLOOD = 2_000  # junk at one result, in so many messages


def attack(function: Attack) -> Attack:
    """Put a function into the table."""
    ATTACKS[function.__name__] = function
    return function


async def make(name: str, attacker: Attacker) -> bool:
    """Make one attack and wait until the server has read it.

    Returns:
        Whether it was made: it has found a target, and its connection was not lost meanwhile.
    """
    await attacker.connected()
    with attacker.attacking(name) as count:
        try:
            await ATTACKS[name](attacker)
            await attacker.drain()
        except NoTarget:
            count.without_target += 1
        except (OSError, TimeoutError):
            count.cut += 1
        else:
            return True
    return False


# -- those who answer write where the attacker may not --------------------------------------------


@attack
async def publish_to_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        if not subject.startswith(attacker.request(IMAGE)):
            attacker.publish(subject)


@attack
async def call_refused_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish(attacker.subjects.call(IMAGE), BAD, reply=subject)


@attack
async def call_with_victims_id_at_its_result(attacker: Attacker) -> None:
    for victim in attacker.ids():
        result = attacker.subjects.result(victim.task, victim.request_id)
        body = attacker.own_body(request_id=victim.request_id, deadline="2020-01-01T00:00:00Z")
        attacker.publish(attacker.subjects.call(IMAGE), body, reply=result)


@attack
async def call_taken_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        body = attacker.own_body(request_id=attacker.own_id())
        attacker.publish(attacker.subjects.call(IMAGE), body, reply=subject)


@attack
async def cancel_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish(attacker.subjects.cancel(attacker.own_id()), reply=subject)


@attack
async def refused_cancel_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish(f"{attacker.subjects.root}.cancel.$", reply=subject)


@attack
async def ping_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish("$SRV.PING.generation", reply=subject)


@attack
async def info_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish("$SRV.INFO.generation", reply=subject)


@attack
async def stats_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish("$SRV.STATS.generation", reply=subject)


@attack
async def reply_to_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        attacker.publish(attacker.request(), attacker.own_body(), headers={REPLY_TO: subject})


@attack
async def reply_to_foreign_replies(attacker: Attacker) -> None:
    victim = await attacker.victim()
    reply_to = f"{attacker.subjects.root}.reply.{victim.request_id}"
    for body in (BAD, json.dumps(attacker.own_body(request_id=attacker.own_id())).encode()):
        attacker.publish(attacker.request(), body, headers={REPLY_TO: reply_to})


# -- the server's own answers ---------------------------------------------------------------------


@attack
async def pub_ack_at_results(attacker: Attacker) -> None:
    for one in attacker.ids():
        result = attacker.subjects.result(one.task, one.request_id)
        attacker.publish(attacker.request(), attacker.own_body(), reply=result)


@attack
async def pub_ack_at_reply(attacker: Attacker) -> None:
    victim = await attacker.victim()
    reply = f"{attacker.subjects.root}.reply.{victim.request_id}"
    attacker.publish(attacker.request(), attacker.own_body(), reply=reply)


@attack
async def refused_pub_ack_at_foreign_subjects(attacker: Attacker) -> None:
    # The server answers with an error and stores nothing: an answer that costs nothing.
    for subject in attacker.forbidden():
        order = {"Nats-Expected-Stream": "OTHER"}
        attacker.publish(attacker.request(), attacker.own_body(), reply=subject, headers=order)


@attack
async def flood_of_junk_at_a_running_result(attacker: Attacker) -> None:
    """More junk than a worker can remove before it stores its own event, as long as it lasts."""
    victim = await attacker.victim()
    result = attacker.subjects.result(victim.task, victim.request_id)
    for _ in range(FLOOD // 100):
        for _ in range(100):
            order = {"Nats-Expected-Stream": "OTHER"}
            attacker.publish(attacker.request(), b"", reply=result, headers=order)
        await attacker.drain()


@attack
async def stored_event_at_foreign_subjects(attacker: Attacker) -> None:
    stream = attacker.subjects.results_stream
    for one in list(attacker.finished)[:1]:
        question = {"last_by_subj": attacker.subjects.result(one.task, one.request_id)}
        for subject in attacker.forbidden():
            attacker.publish(f"$JS.API.STREAM.MSG.GET.{stream}", question, reply=subject)


@attack
async def missing_event_at_foreign_subjects(attacker: Attacker) -> None:
    stream = attacker.subjects.results_stream
    question = {"last_by_subj": attacker.subjects.result(IMAGE, attacker.own_id())}
    for subject in attacker.forbidden():
        attacker.publish(f"$JS.API.STREAM.MSG.GET.{stream}", question, reply=subject)
        attacker.publish(f"$JS.API.STREAM.MSG.GET.{stream}", reply=subject)


@attack
async def direct_get_at_foreign_results(attacker: Attacker) -> None:
    stream = attacker.subjects.results_stream
    for source in list(attacker.finished)[:1]:
        stored = attacker.subjects.result(source.task, source.request_id)
        for one in attacker.ids():
            result = attacker.subjects.result(one.task, one.request_id)
            attacker.publish(f"$JS.API.DIRECT.GET.{stream}.{stored}", reply=result)
            attacker.publish(f"$JS.API.DIRECT.GET.{stream}", {"seq": 1}, reply=result)


@attack
async def missing_direct_get_at_foreign_subjects(attacker: Attacker) -> None:
    # Its answer has no body, which is how the server is asked to purge and to delete.
    stream = attacker.subjects.results_stream
    missing = attacker.subjects.result(IMAGE, attacker.own_id())
    for subject in attacker.forbidden():
        attacker.publish(f"$JS.API.DIRECT.GET.{stream}.{missing}", reply=subject)


@attack
async def stream_api(attacker: Attacker) -> None:
    for stream in (attacker.subjects.results_stream, attacker.subjects.requests_stream(IMAGE)):
        for verb in ("PURGE", "DELETE", "UPDATE", "INFO", "MSG.DELETE", "SNAPSHOT"):
            attacker.publish(f"$JS.API.STREAM.{verb}.{stream}", reply=attacker.inbox)
        attacker.publish(f"$JS.API.CONSUMER.CREATE.{stream}.evil", reply=attacker.inbox)


# -- copies of running requests -------------------------------------------------------------------


@attack
async def invalid_bytes_under_running_id(attacker: Attacker) -> None:
    victim = await attacker.victim()
    subject = attacker.request(victim.task, victim.request_id)
    for body in (b"", b"\xff\xfe", b"{", b"null", BAD, b'{"request_id": "*"}'):
        attacker.publish(subject, body)


@attack
async def invalid_bytes_with_running_id_in_a_header(attacker: Attacker) -> None:
    victim = await attacker.victim()
    named = {MESSAGE_ID: victim.request_id}
    for body in (b"{", BAD):
        attacker.publish(attacker.request(victim.task), body, headers=named)


@attack
async def invalid_body_that_names_running_id(attacker: Attacker) -> None:
    victim = await attacker.victim()
    body = {"request_id": victim.request_id, "prompt": ""}
    attacker.publish(attacker.request(victim.task), body)
    attacker.publish(attacker.request(victim.task, attacker.own_id()), body)


@attack
async def other_content_under_running_id(attacker: Attacker) -> None:
    victim = await attacker.victim()
    body = attacker.own_body(request_id=victim.request_id, width=17)
    if victim.task is IMAGE:
        attacker.publish(attacker.request(IMAGE, victim.request_id), body)
        attacker.publish(attacker.request(IMAGE), body)


@attack
async def other_content_under_finished_id(attacker: Attacker) -> None:
    for victim in list(attacker.finished)[-1:]:
        body = attacker.own_body(request_id=victim.request_id, width=17)
        attacker.publish(attacker.request(IMAGE, victim.request_id), body)


@attack
async def earlier_deadline_under_running_id(attacker: Attacker) -> None:
    victim = await attacker.victim()
    for deadline in (datetime(2020, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(seconds=0.3)):
        body = attacker.own_body(request_id=victim.request_id, deadline=deadline.isoformat())
        attacker.publish(attacker.request(victim.task, victim.request_id), body)
        attacker.publish(attacker.request(victim.task), body)


@attack
async def contradiction_with_running_id(attacker: Attacker) -> None:
    victim = await attacker.victim()
    own = attacker.own_id()
    named = attacker.own_body(request_id=victim.request_id)
    attacker.publish(attacker.request(IMAGE, own), named)
    attacker.publish(attacker.request(IMAGE, victim.request_id), attacker.own_body(request_id=own))


@attack
async def copy_for_the_other_task(attacker: Attacker) -> None:
    victim = await attacker.victim()
    (other,) = set(DEFAULT_QUEUES) - {victim.task}
    attacker.publish(attacker.request(other, victim.request_id), BAD)


@attack
async def copies_that_are_redelivered(attacker: Attacker) -> None:
    """Copies whose model raises: they come again and again, beside the one that runs."""
    victim = await attacker.victim()
    seed = seed_with(Fate.RAISES, attacker.draw)
    body = attacker.own_body(request_id=victim.request_id, seed=seed)
    attacker.publish(attacker.request(IMAGE, victim.request_id), body)


# -- message ids ----------------------------------------------------------------------------------


@attack
async def message_ids_of_others(attacker: Attacker) -> None:
    root, requests = attacker.subjects.root, attacker.subjects.requests_stream(IMAGE)
    for one in attacker.future()[:3] + list(attacker.running)[-2:]:
        chain = f"{one.request_id}-2"
        guesses = [
            *(f"{task}.{one.request_id}{more}" for task in DEFAULT_QUEUES for more in ("", ".")),
            *(f"{task}.{chain}{more}" for task in DEFAULT_QUEUES for more in ("", ".")),
            *(f"{task}.{chain}.{root}.reply.{one.request_id}" for task in DEFAULT_QUEUES),
            *(f"{task}.{one.request_id}.{root}.reply.{one.request_id}" for task in DEFAULT_QUEUES),
            f"{one.request_id}.done",
            f"{chain}.done",
            f"{requests}-{attacker.last_sequence + 1}-{int(time.time()):x}.dead",
            f"{requests}-{attacker.last_sequence + 1}-{int(time.time()):x}.retry",
        ]
        for guess in guesses:
            for task in DEFAULT_QUEUES:
                attacker.publish(attacker.request(task), BAD, headers={MESSAGE_ID: guess})


@attack
async def message_ids_of_own_requests(attacker: Attacker) -> None:
    for guess in ("x" * 60_000, "", "a.b", "*", "..", "é", "x\ty"):
        attacker.publish(attacker.request(), attacker.own_body(), headers={MESSAGE_ID: guess})


# -- bytes ----------------------------------------------------------------------------------------


@attack
async def strange_bytes_in_request_subjects(attacker: Attacker) -> None:
    for byte in STRANGE:
        subject = f"{attacker.request()}.".encode() + b"evil-" + byte + b"x"
        attacker.publish(subject, attacker.own_body())
        attacker.publish(subject, BAD)


@attack
async def strange_bytes_and_a_number_in_request_subjects(attacker: Attacker) -> None:
    # What comes after the white space looks like the other words of the protocol's line.
    for byte in (b"\x0b", b"\x0c"):
        for words in (b"1", b"1" + byte + b"_INBOX_worker.x", b"1" + byte + b"x" + byte + b"0"):
            attacker.publish(f"{attacker.request()}.a".encode() + byte + words, BAD)


@attack
async def long_request_subject(attacker: Attacker) -> None:
    for byte in (b"\x0b", b"x"):
        for length in (LONG, LONGEST):
            subject = f"{attacker.request()}.".encode() + byte + b"x" * length
            attacker.publish(subject, BAD)
            attacker.publish(f"{attacker.subjects.root}.cancel.".encode() + byte + b"x" * length)


@attack
async def strange_bytes_in_call_and_cancel_subjects(attacker: Attacker) -> None:
    root = attacker.subjects.root
    for byte in STRANGE:
        for subject in (f"{root}.cancel.evil-", f"{root}.call."):
            attacker.publish(subject.encode() + byte + b"1", BAD)
            attacker.publish(subject.encode() + byte + b"x", BAD, reply=attacker.inbox)


@attack
async def strange_bytes_in_replies(attacker: Attacker) -> None:
    root = attacker.subjects.root
    for byte in STRANGE:
        reply = b"_INBOX_sender.evil." + byte + b"x"
        attacker.publish(f"{root}.cancel.{attacker.own_id()}", reply=reply)
        attacker.publish(attacker.subjects.call(IMAGE), BAD, reply=reply)
        attacker.publish("$SRV.PING.generation", reply=reply)
        attacker.publish("$SRV.INFO.generation", reply=reply)
        attacker.publish(attacker.request(), attacker.own_body(), reply=reply)


@attack
async def strange_bytes_in_headers(attacker: Attacker) -> None:
    blocks = [
        b"NATS/1.0\r\nA: \xff\xfe\r\n\r\n",
        b"NATS/1.0\r\n\xff: a\r\n\r\n",
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0\r\n : \r\n:\r\n\r\n",
        b"NATS/1.0\r\n\r\n",
        b"NATS/9.9\r\nA: b\r\n\r\n",
        b"\r\n",
        b"\xff" * 20,
        b"NATS/1.0 \r\n\r\n",
        b"NATS/1.0\r\nA: b\x0bc\x0cd\x00e\r\nB:\n C\r\n\r\n",
        b"NATS/1.0\r\n" + b"A: b\r\n" * 5_000 + b"\r\n",
        b"NATS/1.0\r\n" + b"".join(b"H%d: v\r\n" % n for n in range(4_000)) + b"\r\n",
    ]
    await _with_header_blocks(attacker, blocks)


@attack
async def status_lines_in_headers(attacker: Attacker) -> None:
    """Messages that look like the server's own: a pull that has expired, no responders."""
    lines = ["100 Idle Heartbeat", "404 No Messages", "408", "409 Consumer Deleted", "503", "x"]
    await _with_header_blocks(attacker, [f"NATS/1.0 {line}\r\n\r\n".encode() for line in lines])


async def _with_header_blocks(attacker: Attacker, blocks: list[bytes]) -> None:
    for block in blocks:
        cancel = attacker.subjects.cancel(attacker.own_id())
        body = json.dumps(attacker.own_body()).encode()
        attacker.publish(attacker.request(), body, headers=block)
        attacker.publish(attacker.subjects.call(IMAGE), body, reply=attacker.inbox, headers=block)
        attacker.publish(cancel, reply=attacker.inbox, headers=block)
        attacker.publish("$SRV.PING.generation", reply=attacker.inbox, headers=block)
        await attacker.drain()


@attack
async def strange_bodies(attacker: Attacker) -> None:
    deep = b'{"metadata":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001
    bodies = [
        deep,
        b"[" * 100_000,
        b'\xef\xbb\xbf{"prompt": "evil unfated"}',
        b'{"prompt": "evil unfated", "prompt": "evil unfated", "request_id": "a", "request_id": 7}',
        b'{"prompt": "\\ud800", "metadata": {"\\udfff": "\\ud800"}}',
        b'{"prompt": "evil unfated\\u0000", "request_id": "evil-\\u0000"}',
        b'{"prompt": "evil unfated", "seed": 1e400}',
        b'{"prompt": "evil unfated", "guidance_scale": NaN}',
        b'{"prompt": "evil unfated", "seed": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "evil unfated", "deadline": "9999-12-31T23:59:59.999999-23:59"}',
        b'{"prompt": "evil unfated", "deadline": "0001-01-01T00:00:00+23:59"}',
        b'{"prompt": "evil unfated", "deadline": "2030-01-01T00:00:00"}',
        '{"prompt": "evil unfated"}'.encode("utf-16"),
        b'{"prompt": "evil unfated"}\x00',
        b'{"request_id": {"a": []}, "reply_to": ["x"], "prompt": "evil unfated"}',
    ]
    for body in bodies:
        attacker.publish(attacker.request(), body)
        attacker.publish(attacker.subjects.call(IMAGE), body, reply=attacker.inbox)
    await attacker.drain()


@attack
async def bodies_that_are_slow_to_refuse(attacker: Attacker) -> None:
    bodies: list[dict[str, Any]] = [
        {f"k{n}": 1 for n in range(60_000)},
        {"prompt": "a", "metadata": {f"k{n}": "" for n in range(50_000)}},
        {"prompt": "a", "then": [{"task": "x"}] * 50_000},
        {"prompt": "a", "images": [{"bucket": "b"}] * 50_000},
        {"prompt": "a", "x" * 900_000: 1},
    ]
    for body in bodies:
        attacker.publish(attacker.request(), body)
        attacker.publish(attacker.request(TEXT), body)
        attacker.publish(attacker.subjects.call(IMAGE), body, reply=attacker.inbox)
        await attacker.drain()


@attack
async def long_inboxes(attacker: Attacker) -> None:
    inbox = f"_INBOX_sender.evil.{'x' * LONG}"
    root, body = attacker.subjects.root, attacker.own_body()
    attacker.publish(attacker.subjects.call(IMAGE), body, reply=inbox)
    attacker.publish(f"{root}.cancel.{attacker.own_id()}", reply=inbox)
    attacker.publish("$SRV.PING.generation", reply=inbox)
    attacker.publish(attacker.request(), body, reply=inbox)
    for length in (5_000, 60_000):
        reply_to = f"_INBOX_sender.{'x' * length}"
        attacker.publish(attacker.request(), body, headers={REPLY_TO: reply_to})
        attacker.publish(attacker.request(), attacker.own_body(reply_to=reply_to))


@attack
async def inboxes_with_wildcards(attacker: Attacker) -> None:
    for inbox in ("_INBOX_sender.>", "_INBOX_sender.*", "_INBOX_sender..x", ">", "*"):
        attacker.publish(attacker.subjects.call(IMAGE), BAD, reply=inbox)
        attacker.publish(attacker.subjects.cancel(attacker.own_id()), reply=inbox)
        attacker.publish("$SRV.PING.generation", reply=inbox)
        attacker.publish(attacker.request(), BAD, headers={REPLY_TO: inbox})


# -- orders to the server -------------------------------------------------------------------------


@attack
async def orders_to_the_stream(attacker: Attacker) -> None:
    subjects = attacker.subjects
    result = subjects.result(IMAGE, attacker.own_id())
    soon = (datetime.now(UTC) + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    orders: list[dict[str, str]] = [
        {"Nats-Rollup": "all"},
        {"Nats-Rollup": "sub"},
        {"Nats-TTL": "1s"},
        {"Nats-TTL": "never"},
        {"Nats-Schedule": f"@at {soon}", "Nats-Schedule-Target": result},
        {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": attacker.request(TEXT)},
        {"Nats-Schedule": f"@at {soon}", "Nats-Schedule-TTL": "1s"},
        {"Nats-Expected-Stream": subjects.results_stream},
        {"Nats-Expected-Last-Sequence": "0"},
        {"Nats-Expected-Last-Subject-Sequence": "0"},
        {"Nats-Expected-Last-Msg-Id": "x"},
        {"Nats-Marker-Reason": "MaxAge"},
        {"Nats-Incr": "+1"},
        {"Nats-Batch-Id": "evil", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
        {"Nats-Required-Api-Level": "99"},
        {"Nats-Stream": "x", "Nats-Subject": result, "Nats-Sequence": "1"},
        {"Nats-No-Wait": "1", "Status": "404", "Description": "No Messages"},
    ]
    for order in orders:
        attacker.publish(
            attacker.request(), attacker.own_body(), reply=attacker.inbox, headers=order
        )
    victim = await attacker.victim()
    subject = attacker.request(victim.task, victim.request_id)
    attacker.publish(subject, BAD, reply=attacker.inbox, headers={"Nats-Rollup": "sub"})


@attack
async def orders_that_only_clients_understand(attacker: Attacker) -> None:
    """Header names with white space before the colon: the server reads over them.

    nats-py strips them. A worker that published them again would give these orders by itself, with
    its own permissions.
    """
    victim = attacker.subjects.result(IMAGE, attacker.own_id())
    orders = {
        "Nats-Rollup": "all",
        "Nats-Msg-Id": "evil",
        "Nats-TTL": "1s",
        "Nats-Trace-Dest": victim,
        "Nats-Expected-Stream": "OTHER",
        "Nats-Expected-Last-Subject-Sequence": "77",
        "Nats-Schedule": "@every 1s",
        "Nats-Schedule-Target": victim,
        REPLY_TO: victim,
    }
    seed = seed_with(Fate.RAISES, attacker.draw)  # comes again, from wherever it is kept
    for body in (attacker.own_body(seed=seed), attacker.own_body(), {"prompt": 1}):
        headers = {f"{name} ": value for name, value in orders.items()}
        attacker.publish(attacker.request(), body, headers=headers)


@attack
async def traces_at_foreign_subjects(attacker: Attacker) -> None:
    for subject in attacker.forbidden():
        for more in ({}, {"Nats-Trace-Only": "true"}):
            order = {"Nats-Trace-Dest": subject, **more}
            attacker.publish(attacker.request(), attacker.own_body(), headers=order)


@attack
async def every_header_of_the_daemon(attacker: Attacker) -> None:
    """Headers with which workers speak to each other: counts of attempts, reasons, ids."""
    names = {
        value
        for name, value in vars(headers).items()
        if name.isupper() and isinstance(value, str) and not name.startswith("_")
    }
    for value in ("0", "-5", "99", "evil", "1e9", "\u0661", ""):
        forged = {name: value for name in sorted(names) if name not in {MESSAGE_ID, REPLY_TO}}
        forged |= {"Nats-Num-Delivered": value, "Attempts": value, "Generation-Attempts": value}
        attacker.publish(attacker.request(), attacker.own_body(), headers=forged)
        attacker.publish(attacker.request(), BAD, headers=forged)


# -- load -----------------------------------------------------------------------------------------


@attack
async def storm_of_cancellations(attacker: Attacker) -> None:
    for _ in range(STORM):
        attacker.publish(attacker.subjects.cancel(attacker.own_id()), reply=attacker.inbox)


@attack
async def fat_requests_that_are_cancelled(attacker: Attacker) -> None:
    for _ in range(2):
        one = attacker.own_id()
        body = json.dumps(attacker.own_body(request_id=one)).encode().ljust(FAT)
        attacker.publish(attacker.request(IMAGE, one), body)
        attacker.publish(attacker.subjects.cancel(one), reply=attacker.inbox)
    await attacker.drain()


@attack
async def fat_invalid_request(attacker: Attacker) -> None:
    attacker.publish(attacker.request(IMAGE, attacker.own_id()), b"x" * FAT)
    large = {"A": "x" * 60_000}
    attacker.publish(attacker.request(), b"x" * (FAT - 61_000), headers=large)


@attack
async def copies_of_one_own_id(attacker: Attacker) -> None:
    one = attacker.own_id()
    for width in range(16, 36):
        attacker.publish(attacker.request(IMAGE, one), attacker.own_body(width=width))
    attacker.publish(attacker.subjects.cancel(one), reply=attacker.inbox)


@attack
async def requests_whose_model_raises(attacker: Attacker) -> None:
    for _ in range(3):
        body = attacker.own_body(seed=seed_with(Fate.RAISES, attacker.draw))
        attacker.publish(attacker.request(), body)


@attack
async def inputs_that_do_not_exist(attacker: Attacker) -> None:
    key = {"bucket": "generation", "key": "generation/text_to_image/nothing/0.png"}
    images: list[Any] = [
        key,
        {"bucket": "other", "key": "x"},
        {"bucket": "generation", "key": "generation/../x"},
        {"base64": "AAAA"},
        {"url": "https://127.0.0.1/x"},
        "s3://generation/x",
        "https://127.0.0.1/x",
        "data:image/png;base64,AAAA",
    ]
    for image in images:
        body = {"prompt": "evil unfated", "images": [image], "max_new_tokens": 1}
        attacker.publish(attacker.request(TEXT), body)


@attack
async def absurd_slips(attacker: Attacker) -> None:
    read = {"task": "image_to_text", "prompt": "evil unfated", "each": True, "max_new_tokens": 1}
    draw = {
        "task": "text_to_image",
        "prompt": "$text unfated",
        "num_images": 2,
        "num_inference_steps": 1,
    }
    slips: list[list[dict[str, Any]]] = [
        [read, draw, read, draw, read, draw],  # two branches, four, eight
        [read, {**draw, "num_images": 8}] * 4,
        [{**draw, "prompt": "$text unfated"}] * 8,
        [{**draw, "prompt": "evil unfated"}] * 9,
        [{**read, "images": ["$outputs"]}],
    ]
    for slip in slips:
        attacker.publish(attacker.request(), attacker.own_body(num_images=2, then=slip))


@attack
async def foreign_place_in_a_chain(attacker: Attacker) -> None:
    """A request of the attacker's own that claims to be a later step of a running chain."""
    victim = await attacker.victim()
    for link in ({"id": victim.request_id, "step": 1}, {"id": victim.request_id, "step": 9}):
        body = attacker.own_body(chain={**link, "branch": ""})
        attacker.publish(attacker.request(IMAGE, attacker.own_id()), body)


@attack
async def fat_metadata(attacker: Attacker) -> None:
    metadata = {f"{n:064}": "\U0001f600" * 512 for n in range(16)}
    body = attacker.own_body(metadata=metadata)
    attacker.publish(attacker.request(), body)
    attacker.publish(attacker.subjects.call(IMAGE), body, reply=attacker.inbox)


@attack
async def foreign_traces(attacker: Attacker) -> None:
    good = f"00-{'1' * 32}-{'2' * 16}-01"
    for value in (good, good.upper(), f"00-{'0' * 32}-{'0' * 16}-00", "x" * 60_000, "é", ""):
        attacker.publish(attacker.request(), BAD, headers={"traceparent": value, "tracestate": "a"})
