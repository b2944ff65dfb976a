"""A short soak with all kinds of faults, and tests of the checks after a soak."""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from generation_contracts import Subjects
from generation_contracts.examples import EVENTS
from generation_contracts.headers import DEAD_LETTER_REQUEST_ID, MESSAGE_ID
from generation_contracts.requests import digest_of_bytes
from tests.hostile.attacks import ATTACKS
from tests.soak.chaos import AT_LEAST, Kind
from tests.soak.figures import longest_stall
from tests.soak.records import Records, Stored
from tests.soak.scenes import Options
from tests.soak.soaking import soak
from tests.soak.verdict import expected, problems
from tests.soak.workload import Sending, Workload

SHA256 = "0" * 64
KEY = "root/text_to_image/done/0.png"
COMMON: dict[str, Any] = {"request_digest": digest_of_bytes(b"")}


@pytest.mark.timeout(400)  # seconds; 25 on idle cores
async def test_short_soak_has_no_violations(tmp_path: Path) -> None:
    seed = secrets.randbelow(2**32)
    async with soak(Options(requests=40, workers=2, seconds=15, seed=seed), tmp_path) as soaked:
        print("\n".join(soaked.figures()))  # noqa: T201 - for the reader of the log
        assert soaked.problems() == [], f"seed {seed}"
        kinds = [fault.kind for fault in soaked.faults]
        assert all(kinds.count(kind) >= AT_LEAST for kind in Kind)
        assert len(soaked.records.results) == 40
        assert -9 in soaked.records.exit_codes


@pytest.mark.timeout(120)  # seconds; 20 on idle cores
async def test_attacks_do_not_affect_other_requests(tmp_path: Path) -> None:
    """Run every attack of tests/hostile once, together with a few ordinary requests."""
    seed = secrets.randbelow(2**32)
    options = Options(
        requests=15, workers=2, seconds=5, seed=seed, hostile=True, chaos=False, progress_timeout=45
    )
    async with soak(options, tmp_path) as soaked:
        print("\n".join(soaked.figures()))  # noqa: T201 - for the reader of the log
        assert soaked.attacker is not None
        assert set(soaked.attacker.counts) == set(ATTACKS)
        assert soaked.problems() == [], f"seed {seed}"


# -- parts of the soak ----------------------------------------------------------------------------


def sending(request_id: str, *outcomes: str, kind: str = "plain") -> Sending:
    headers = {MESSAGE_ID: f"{request_id}.1"}
    return Sending(0.0, kind, request_id, None, b"", headers, frozenset(outcomes))


def succeeded(request_id: str, key: str = KEY) -> Stored:
    outputs = [{"key": key, "sha256": SHA256}]
    event = {**COMMON, "type": "generation.v1.succeeded", "outputs": outputs}
    event["request_id"] = request_id
    return Stored(request_id, 1.0, event)


def failed(request_id: str, code: str) -> Stored:
    event: dict[str, Any] = {**COMMON, "type": "generation.v1.failed", "failure": {"code": code}}
    event["request_id"] = request_id
    return Stored(request_id, 1.0, event)


SENDINGS = [
    sending("done", "succeeded"),
    sending("bad", "invalid_request"),
    sending("raises", "model_error"),
]
GOOD = Records(
    results=[succeeded("done"), failed("bad", "invalid_request"), failed("raises", "model_error")],
    counts={f"text_to_image.{name}": 1 for name in ("done", "bad", "raises")},
    letters=[{DEAD_LETTER_REQUEST_ID: "bad"}, {DEAD_LETTER_REQUEST_ID: "raises"}],
    objects={KEY: SHA256},
    replies={"done": [succeeded("done").event]},
    exit_codes=[0, -9, 70],
)


FORGED = Stored("done", 1.0, {**succeeded("done").event, "request_digest": "sha256:other"})
JUNK = Stored("done", 1.0, {"type": "junk"})


def test_correct_results_have_no_violations() -> None:
    assert problems(SENDINGS, GOOD) == []


@pytest.mark.parametrize(
    ("broken", "violation"),
    [
        ({"results": GOOD.results[1:]}, "done (plain): 0 terminal events"),
        ({"results": [*GOOD.results, succeeded("done")]}, "done (plain): 2 terminal events"),
        ({"counts": {**GOOD.counts, "text_to_image.done": 2}}, "differs from its messages"),
        ({"results": [*GOOD.results, failed("new", "internal")]}, "never sent"),
        (
            {"results": [failed("done", "internal"), *GOOD.results[1:]]},
            "done (plain): ended as int",
        ),
        (
            {"results": [GOOD.results[0], failed("bad", "worker_lost"), GOOD.results[2]]},
            "bad (plain): ended as worker_lost",
        ),
        ({"remaining": 1}, "1 requests left in the queue"),
        ({"unsettled": 1}, "1 unsettled"),
        ({"objects": {}}, f"{KEY} does not exist"),
        ({"objects": {KEY: "1" * 64}}, "has another SHA-256 than in its event"),
        (
            {"objects": {**GOOD.objects, "root/text_to_image/raises/0.png": SHA256}},
            "raises/0.png belongs to no succeeded request",
        ),
        ({"letters": GOOD.letters[1:]}, "bad: no dead letter"),
        ({"letters": GOOD.letters[:1]}, "raises: no dead letter"),
        ({"letters": [*GOOD.letters, GOOD.letters[0]]}, "bad: 2 dead letters of 1 messages"),
        (
            {"letters": [*GOOD.letters, {DEAD_LETTER_REQUEST_ID: "done"}]},
            "done: a dead letter, but another outcome",
        ),
        ({"replies": {"done": [succeeded("done", "other").event]}}, "not the stored event"),
        ({"replies": {"done": [succeeded("bad").event]}}, "not the stored event"),
        ({"results": [FORGED, *GOOD.results[1:]]}, "done (plain): ended with the event of another"),
        ({"results": [JUNK, *GOOD.results[1:]]}, "done (plain): ended as junk"),
        ({"unsent": ["done"]}, "done: could not be sent"),
        ({"cancellations": {"done": "cancelled"}}, "but the outcome is succ"),
        ({"replies": {"done": [failed("done", "request_id_conflict").event]}}, "not the stored"),
        ({"exit_codes": [1]}, "a worker exited with 1"),
        ({"forbidden_lines": ["worker-0: daemon_failed"]}, "daemon_failed"),
        ({"orphans": [17]}, "left behind by killed workers: [17]"),
    ],
)
def test_each_violation_is_reported(broken: dict[str, Any], violation: str) -> None:
    assert any(violation in one for one in problems(SENDINGS, replace(GOOD, **broken)))


def test_every_request_may_fail_with_worker_lost() -> None:
    records = replace(
        GOOD,
        results=[failed("done", "worker_lost"), *GOOD.results[1:]],
        letters=[*GOOD.letters, {DEAD_LETTER_REQUEST_ID: "done"}],
        replies={},
    )
    assert problems(SENDINGS, records) == []  # its object may have been uploaded


def test_a_conflict_of_two_contents_is_accepted() -> None:
    twice = [sending("done", "succeeded", kind="other content"), *SENDINGS[1:]]
    conflict = failed("done", "request_id_conflict").event
    assert problems(twice, replace(GOOD, replies={"done": [conflict]})) == []


@pytest.mark.parametrize(
    ("code", "digest", "accepted"),
    [
        ("request_id_conflict", "sha256:other", True),
        ("invalid_request", "sha256:other", True),
        ("request_id_conflict", COMMON["request_digest"], False),
        ("worker_lost", "sha256:other", False),
    ],
)
def test_replies_to_an_attackers_copies_are_accepted(
    code: str, digest: str, accepted: bool
) -> None:
    reply = {**failed("done", code).event, "request_digest": digest}
    records = replace(GOOD, replies={"done": [reply, failed("other", code).event]})
    assert (problems(SENDINGS, records, hostile=True) == []) is accepted


def test_later_steps_of_chains_are_checked() -> None:
    body = b'{"prompt": "a", "then": [{"task": "text_to_image", "prompt": "b"}]}'
    chain = Sending(0.0, "chain", "tour", "tour", body, {}, frozenset({"succeeded"}))
    ended = failed("tour", "worker_lost")
    assert set(expected([chain], [ended])) == {"tour"}
    event = EVENTS["succeeded_image"].model_dump(mode="json")
    assert set(expected([chain], [Stored("tour", 1.0, event)])) == {"tour", "tour-2"}


def test_equal_seeds_draw_equal_requests() -> None:
    def drawn(seed: int) -> list[bytes]:
        workload = Workload(Subjects(), seed, seconds=60.0, costly=True)
        return [one.body for one in workload.sendings(100) if one.kind != "deadline short"]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("waiting", "seconds"),
    [
        ([], 0.0),
        ([(0.0, 1.0), (5.0, 7.0)], 2.0),  # no request waits between the two
        ([(0.0, 1.0), (0.5, 7.0)], 6.0),
        ([(0.0, 7.0), (6.0, 8.0)], 7.0),
    ],
)
def test_the_longest_stall_counts_only_while_a_request_waits(
    waiting: list[tuple[float, float]], seconds: float
) -> None:
    assert longest_stall(waiting) == seconds
