"""Content Credentials in daemon processes: signed files, a failing signer, and a killed worker."""

import asyncio
import hashlib
import signal

import pytest

from tests.faults.test_killed_worker import killed
from tests.support.content_credentials import SECRET, Certificate, certificate, read
from tests.support.observations import published_digests, stored_digests
from tests.support.scene import Event, Scene

__all__ = ["certificate"]


async def assert_valid(scene: Scene, event: Event, certificate: Certificate) -> None:
    """Check that every file of an event is signed, and has the digest of the event."""
    assert event["type"] == "generation.v1.succeeded"
    for output in event["outputs"]:
        data = await scene.object(output)
        assert output["marks"] == ["iptc", "c2pa"]
        assert hashlib.sha256(data).hexdigest() == output["sha256"]
        assert output["sha256"][:8] in output["key"]
        found = read(data, output["media_type"], certificate)
        assert (found.state, found.failures) == ("Trusted", set())
        values = found.assertions["generation_consumer.generation"]
        assert values["request_id"] == event["request_id"]
        assert values["model"] == event["model"]["id"]
        assert int(values["seed"]) == output["seed"]


async def test_daemon_signs_each_format(scene: Scene, certificate: Certificate) -> None:
    await scene.start(**certificate.settings)
    for output_format in ("png", "webp", "jpeg"):
        event = await scene.event(await scene.submit(output_format=output_format, num_images=2))
        assert event["outputs"][0]["media_type"] == f"image/{output_format}"
        await assert_valid(scene, event, certificate)


async def test_daemon_with_a_failing_signer_fails_the_request(
    scene: Scene, certificate: Certificate
) -> None:
    worker = await scene.start(**certificate.with_callback("refuse"))
    event = await scene.event(await scene.submit())
    assert event["failure"]["code"] == "internal"
    assert event["failure"]["details"] == {"cause": "not_signed"}
    await scene.until_empty()
    (letter,) = await scene.dead_letters()
    assert letter["Dead-Letter-Request-Id"] == event["request_id"]
    assert await scene.keys() == set()
    log = worker.log_since_start()
    assert "the callback failed: ConnectionError" in log
    assert SECRET not in log


async def test_daemon_with_a_failing_signer_stores_an_unsigned_file_as_best_effort(
    scene: Scene, certificate: Certificate
) -> None:
    await scene.start(**{**certificate.with_callback("refuse"), "CONSUMER_C2PA": "best-effort"})
    event = await scene.event(await scene.submit())
    (output,) = event["outputs"]
    assert output["marks"] == ["iptc"]
    assert event["warnings"] == ["image 0 has no Content Credentials: it could not be signed"]
    assert b"trainedAlgorithmicMedia" in await scene.object(output)


async def test_second_run_after_a_crash_stores_another_valid_file(
    scene: Scene, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing = {**scene.settings(), **certificate.settings}
    monkeypatch.setattr(scene, "settings", lambda: signing)
    recovery = await killed(scene, "killed_after_upload")
    await assert_valid(scene, recovery.reply, certificate)
    stored = await stored_digests(scene)
    published = published_digests(recovery.reply)
    assert published.items() < stored.items(), "the first file remains under its own key"
    assert len(stored) == 2


async def test_hanging_signer_does_not_hold_up_the_exit(
    scene: Scene, certificate: Certificate
) -> None:
    grace = {"CONSUMER_DRAIN_GRACE": "0.1"}
    worker = await scene.start(**certificate.with_callback("hang"), **grace)
    request_id = await scene.submit()
    await scene.until_noted("runs")
    await scene.until_noted("signing")
    await asyncio.to_thread(worker.signal, signal.SIGTERM)
    assert await scene.exit_code(worker) == 0
    await scene.start()
    assert (await scene.event(request_id))["type"] == "generation.v1.succeeded"
