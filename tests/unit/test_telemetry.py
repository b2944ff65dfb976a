"""What is counted of jobs, and what is written in a log line and what never is."""

import gc
import json
import logging
import weakref
from typing import Literal

import pytest
import structlog

from consumer.metrics import Metrics
from consumer.telemetry import JobReport
from tests.daemon_logging import daemon_logging

FORMATS = pytest.mark.parametrize("log_format", ["json", "console"])
PROMPT = "a prompt that is nobody's business"


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample as Prometheus would show it, without the buckets and the times of making."""
    return {
        sample.name + str(sample.labels or ""): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


# -- metrics --------------------------------------------------------------------------------------


def test_jobs_are_counted_by_outcome_with_the_time_of_each_stage() -> None:
    metrics = Metrics("text_to_image")
    for _ in range(4):
        metrics.job_started()
    metrics.job_finished(JobReport("succeeded", 1, queued=0.5, inference=2, encode=0.25, upload=1))
    metrics.job_finished(JobReport("succeeded", 2, queued=1.5, inference=4, encode=0.25, upload=2))
    metrics.job_finished(JobReport("deadline_exceeded", 1, queued=8))
    metrics.device_busy(6.5)
    task = "{'task': 'text_to_image'}"
    assert samples(metrics) == {
        "generation_jobs_total{'task': 'text_to_image', 'outcome': 'succeeded'}": 2,
        "generation_jobs_total{'task': 'text_to_image', 'outcome': 'deadline_exceeded'}": 1,
        f"generation_redelivered_jobs_total{task}": 1,
        f"generation_jobs_in_flight{task}": 1,
        f"generation_queue_wait_seconds_count{task}": 3,
        f"generation_queue_wait_seconds_sum{task}": 10,
        f"generation_inference_seconds_count{task}": 2,
        f"generation_inference_seconds_sum{task}": 6,
        f"generation_encode_seconds_count{task}": 2,
        f"generation_encode_seconds_sum{task}": 0.5,
        f"generation_upload_seconds_count{task}": 2,
        f"generation_upload_seconds_sum{task}": 3,
        f"generation_device_busy_seconds_total{task}": 6.5,
    }


def test_store_is_shown_as_it_last_answered() -> None:
    metrics = Metrics("text_to_image")
    up = "generation_store_reachable{'task': 'text_to_image'}"
    failures = "generation_store_failures_total{'task': 'text_to_image'}"
    metrics.store_reachable(True)  # noqa: FBT003 - the observer's own
    assert samples(metrics) == {up: 1}
    metrics.store_reachable(False, "503")  # noqa: FBT003 - the same
    metrics.store_reachable(False, "503")  # noqa: FBT003 - the same
    assert samples(metrics) == {up: 0, failures: 2}
    metrics.store_reachable(True)  # noqa: FBT003 - the same
    assert samples(metrics) == {up: 1, failures: 2}


def test_daemons_in_one_process_count_apart() -> None:
    first, second = Metrics("text_to_image"), Metrics("image_to_text")
    first.device_busy(1)
    assert samples(second) == {}


# -- logs -----------------------------------------------------------------------------------------


def test_log_line_is_json_with_what_is_bound_to_the_job() -> None:
    with daemon_logging() as written:
        log = structlog.get_logger()
        with structlog.contextvars.bound_contextvars(request_id="a", task="text_to_image"):
            log.info("job_started", queued=0.5)
        log.info("idle")
        log.debug("not told at this level")
    started, idle = (json.loads(line) for line in written.getvalue().splitlines())
    assert started.pop("timestamp").endswith("Z")
    assert started == {
        "event": "job_started",
        "level": "info",
        "queued": 0.5,
        "request_id": "a",
        "task": "text_to_image",
    }
    assert "request_id" not in idle


def test_warnings_of_the_libraries_are_lines_of_the_same_form() -> None:
    with daemon_logging() as written, structlog.contextvars.bound_contextvars(request_id="a"):
        library = logging.getLogger("library")
        library.warning("slow %s", "disk")
        library.info("not told")
        try:
            fail(PROMPT)
        except ValueError:
            library.exception("lost")
    slow, lost = (json.loads(line) for line in written.getvalue().splitlines())
    assert (slow["event"], slow["level"], slow["request_id"]) == ("slow disk", "warning", "a")
    assert lost["exception"][0]["exc_type"] == "ValueError"
    assert PROMPT not in written.getvalue()


def fail(prompt: str) -> None:
    """Raise with a prompt in the frame, from an error that has one in its frame too."""

    def cause() -> None:
        asked = {"prompt": prompt, "size": len(prompt)}
        raise KeyError(len(asked))

    try:
        cause()
    except KeyError as error:
        raise ValueError("in the model") from error


@FORMATS
def test_traceback_in_the_log_has_the_places_and_none_of_the_values(
    log_format: Literal["json", "console"],
) -> None:
    with daemon_logging(log_format) as written:
        try:
            fail(PROMPT)
        except ValueError:
            structlog.get_logger().exception("job_abandoned")
    text = written.getvalue()
    assert "job_abandoned" in text
    assert "ValueError" in text
    assert "KeyError" in text
    assert "test_telemetry.py" in text
    assert "nobody's business" not in text
    if log_format == "json":
        assert text.count("\n") == 1
        json.loads(text)


class Fault(Exception):  # noqa: N818 - one that a weak reference can be had of
    """Stands for any error."""


def raise_fault() -> None:
    raise Fault


@FORMATS
def test_logged_exception_is_not_kept(
    log_format: Literal["json", "console"],
) -> None:
    watched: list[weakref.ref[Fault]] = []
    gc.disable()  # it would free a reference cycle by luck
    with daemon_logging(log_format):
        try:
            raise_fault()
        except Fault as error:
            watched.append(weakref.ref(error))
            structlog.get_logger().error("worker_failed", exc_info=error)
    alive = [one() for one in watched]
    gc.enable()
    assert alive == [None]
