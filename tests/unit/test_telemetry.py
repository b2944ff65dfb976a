"""Metrics of jobs, and the content of log lines."""

import gc
import json
import logging
import os
import select
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal, TextIO

import pytest
import structlog

from consumer.app.metrics import Metrics
from consumer.jobs.outcomes import Decision, decide, outcome_label
from consumer.media.ai_mark import SOFTWARE
from consumer.telemetry import JobReport, LogStream
from generation_contracts import FailureCode, ModelInfo
from tests.support.daemon_logging import daemon_logging, logging_to
from tests.support.settlement_table import every_outcome, example

FORMATS = pytest.mark.parametrize("log_format", ["json", "console"])
PROMPT = "a confidential prompt"


def samples(metrics: Metrics) -> dict[str, float]:
    """Return all samples that are not 0, without the metrics of the process."""
    return {
        sample.name + str(sample.labels or ""): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.value and not sample.name.endswith(("_bucket", "_created", "_info"))
        if not sample.name.startswith("process_")
        if not sample.name.endswith("_timestamp_seconds")
    }


def series(metrics: Metrics, name: str) -> dict[str, float]:
    """Return the samples of a metric by the value of the label that is no task or queue."""
    return {
        next(
            value for label, value in sample.labels.items() if label not in {"task", "queue"}
        ): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


# -- metrics --------------------------------------------------------------------------------------


def test_metrics_count_jobs_by_outcome_and_the_time_of_each_stage() -> None:
    metrics = Metrics("text_to_image")
    for _ in range(5):
        metrics.job_started()
    metrics.job_finished(JobReport("succeeded", 1, queued=0.5, inference=2, encode=0.25, upload=1))
    metrics.job_finished(JobReport("succeeded", 2, queued=1.5, inference=4, encode=0.25, upload=2))
    metrics.job_finished(JobReport("deadline_exceeded", 1, queued=8))
    metrics.job_finished(JobReport("requeued", 1, unsigned=2))
    metrics.device_busy(6.5)
    own = "'task': 'text_to_image', 'queue': 'text_to_image'"
    task = f"{{{own}}}"
    assert samples(metrics) == {
        f"generation_jobs_total{{{own}, 'outcome': 'succeeded'}}": 2,
        f"generation_jobs_total{{{own}, 'outcome': 'deadline_exceeded'}}": 1,
        f"generation_failures_total{{{own}, 'code': 'deadline_exceeded'}}": 1,
        f"generation_jobs_total{{{own}, 'outcome': 'requeued'}}": 1,
        f"generation_unsigned_images_total{task}": 2,
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


@pytest.mark.parametrize(
    "notify", [lambda metrics: metrics.device_stepped(), lambda metrics: metrics.device_busy(1)]
)
def test_last_step_is_the_time_of_the_last_progress(notify: Callable[[Metrics], None]) -> None:
    metrics = Metrics("text_to_image")

    def last_step() -> float | None:
        return metrics.registry.get_sample_value(
            "generation_last_step_timestamp_seconds",
            {"task": "text_to_image", "queue": "text_to_image"},
        )

    assert last_step() == 0
    began = time.time()
    notify(metrics)
    assert began <= (last_step() or 0) <= time.time()


def test_refused_calls_are_counted_by_code() -> None:
    metrics = Metrics("text_to_image")
    metrics.call_refused(FailureCode.QUEUE_FULL)
    metrics.call_refused(FailureCode.WORKER_LOST)  # a code that the endpoint does not use
    counted = series(metrics, "generation_refused_calls_total")
    assert {code for code, number in counted.items() if number} == {"queue_full", "worker_lost"}
    assert counted["invalid_request"] == 0  # exported from the start


def test_store_metric_has_the_last_state_of_the_store() -> None:
    metrics = Metrics("text_to_image")
    up = "generation_store_reachable{'task': 'text_to_image', 'queue': 'text_to_image'}"
    failures = "generation_store_failures_total{'task': 'text_to_image', 'queue': 'text_to_image'}"
    metrics.store_reachable(True)  # noqa: FBT003 - the signature of the observer
    assert samples(metrics) == {up: 1}
    metrics.store_reachable(False, "503")  # noqa: FBT003 - the signature of the observer
    metrics.store_reachable(False, "503")  # noqa: FBT003 - the signature of the observer
    assert samples(metrics) == {failures: 2}
    metrics.store_reachable(True)  # noqa: FBT003 - the signature of the observer
    assert samples(metrics) == {up: 1, failures: 2}


def test_metrics_of_two_daemons_in_one_process_are_separate() -> None:
    first, second = Metrics("text_to_image"), Metrics("image_to_text")
    first.device_busy(1)
    assert samples(second) == {}


def decisions() -> Iterator[Decision]:
    """Yield the decision for every outcome, at the first and at the last attempt."""
    for kind in every_outcome():
        for attempt in (1, 3):
            yield decide(example(kind), attempt=attempt, max_attempts=3)


def test_every_outcome_is_exported_from_the_start() -> None:
    metrics = Metrics("text_to_image")
    ended = list(decisions())
    names = {outcome_label(None), *map(outcome_label, ended)}
    assert names == series(metrics, "generation_jobs_total").keys()
    codes = {str(one.failure.code) for one in ended if one.failure is not None}
    assert codes == series(metrics, "generation_failures_total").keys()
    dead = {str(one.failure.code) for one in ended if one.dead_letter and one.failure}
    assert dead == series(metrics, "generation_dead_letters_total").keys()


def test_failures_and_dead_letters_are_counted_by_code() -> None:
    metrics = Metrics("text_to_image")
    for report in (
        JobReport("succeeded", 1),
        JobReport("requeued", 1),
        JobReport("out_of_memory", 1),
        JobReport("model_error", 3, dead_letter=True),
        JobReport("internal", 1),  # a result that is too large is not dead-lettered
        JobReport("a_later_code", 1, dead_letter=True),
    ):
        metrics.job_finished(report)
    counted = {k: v for k, v in series(metrics, "generation_failures_total").items() if v}
    assert counted == {"out_of_memory": 1, "model_error": 1, "internal": 1, "a_later_code": 1}
    dead = {k: v for k, v in series(metrics, "generation_dead_letters_total").items() if v}
    assert dead == {"model_error": 1, "a_later_code": 1}


def test_info_metrics_have_the_model_and_the_version() -> None:
    metrics = Metrics("text_to_image")
    metrics.model_loaded(
        ModelInfo(
            id="some/model",
            family="FluxPipeline",
            dtype="bfloat16",
            device="cuda",
            libraries={"diffusers": "0.42.0", "torch": "2.15.0+cu128"},
        )
    )
    info = {
        sample.name: sample.labels
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.endswith("_info")
    }
    assert info == {
        "generation_build_info": {
            "task": "text_to_image",
            "queue": "text_to_image",
            "version": version(SOFTWARE),
        },
        "generation_model_info": {
            "task": "text_to_image",
            "queue": "text_to_image",
            "id": "some/model",
            "family": "FluxPipeline",
            "dtype": "bfloat16",
            "device": "cuda",
            "diffusers": "0.42.0",
            "torch": "2.15.0+cu128",
        },
    }


# -- logs -----------------------------------------------------------------------------------------


def test_log_line_is_json_with_the_bound_fields_of_the_job() -> None:
    with daemon_logging() as written:
        log = structlog.get_logger()
        with structlog.contextvars.bound_contextvars(request_id="a", task="text_to_image"):
            log.info("job_started", queued=0.5)
        log.info("idle")
        log.debug("below the log level")
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


def test_library_warnings_are_json_log_lines() -> None:
    with daemon_logging() as written, structlog.contextvars.bound_contextvars(request_id="a"):
        library = logging.getLogger("library")
        library.warning("slow %s", "disk")
        library.info("below the log level")
        try:
            fail(PROMPT)
        except ValueError:
            library.exception("lost")
    slow, lost = (json.loads(line) for line in written.getvalue().splitlines())
    assert (slow["event"], slow["level"], slow["request_id"]) == ("slow disk", "warning", "a")
    assert lost["exception"][0]["exc_type"] == "ValueError"
    assert PROMPT not in written.getvalue()


def fail(prompt: str) -> None:
    """Raise an error with a cause; both frames have a variable with the prompt."""

    def cause() -> None:
        request = {"prompt": prompt, "size": len(prompt)}
        raise KeyError(len(request))

    try:
        cause()
    except KeyError as error:
        raise ValueError("in the model") from error


@FORMATS
def test_logged_traceback_has_lines_and_no_variable_values(
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
    assert "confidential" not in text
    if log_format == "json":
        assert text.count("\n") == 1
        json.loads(text)


class Fault(Exception):  # noqa: N818 - an exception that supports weak references
    """Stands for any error."""


def raise_fault() -> None:
    raise Fault


@FORMATS
def test_logger_keeps_no_reference_to_an_exception(
    log_format: Literal["json", "console"],
) -> None:
    watched: list[weakref.ref[Fault]] = []
    gc.disable()  # the garbage collector could free a reference cycle
    with daemon_logging(log_format):
        try:
            raise_fault()
        except Fault as error:
            watched.append(weakref.ref(error))
            structlog.get_logger().error("worker_failed", exc_info=error)
    alive = [one() for one in watched]
    gc.enable()
    assert alive == [None]


# -- unwritable logs ------------------------------------------------------------------------------


@contextmanager
def no_reader() -> Iterator[TextIO]:
    """Open a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


@contextmanager
def full_disk() -> Iterator[TextIO]:
    with open("/dev/full", "w") as stream:  # noqa: PTH123 - a device file
        yield stream


@contextmanager
def closed() -> Iterator[TextIO]:
    with open(os.devnull, "w") as stream:  # noqa: PTH123 - a device file
        pass
    yield stream


@contextmanager
def descriptor_closed() -> Iterator[TextIO]:
    read, write = os.pipe()
    stream = os.fdopen(write, "w", closefd=False)
    os.close(write)
    yield stream
    os.close(read)


@contextmanager
def none() -> Iterator[None]:
    yield None


@FORMATS
@pytest.mark.parametrize("broken", [no_reader, full_disk, closed, descriptor_closed, none])
def test_lost_log_lines_are_counted_without_an_error(
    broken: Callable[[], Iterator[TextIO]], log_format: Literal["json", "console"]
) -> None:
    metrics = Metrics("text_to_image")

    def lost() -> float:
        name, labels = (
            "generation_lost_log_lines_total",
            dict.fromkeys(["task", "queue"], "text_to_image"),
        )
        return metrics.registry.get_sample_value(name, labels) or 0.0

    before = lost()
    with broken() as stream, logging_to(stream, log_format):  # type: ignore[attr-defined]
        structlog.get_logger().info("one")
        logging.getLogger("library").warning("two")
        print("three", file=sys.stderr)  # noqa: T201 - libraries also print
    assert lost() - before >= 3


def test_slow_log_reader_does_not_block_and_gets_the_number_of_lost_lines() -> None:
    read, write = os.pipe()
    lines = 3000
    with os.fdopen(write, "w") as stream, os.fdopen(read, "rb") as reader, logging_to(stream):
        log = structlog.get_logger()
        before = LogStream.lost_lines
        for number in range(lines):
            log.info("line", number=number, long="x" * (10_000 if number % 10 == 0 else 10))
        lost = LogStream.lost_lines - before
        assert 0 < lost < lines
        os.set_blocking(read, False)
        text = reader.read()
        log.info("again")
        text += reader.read()
    *whole, missing, again = (_parsed(line) for line in text.splitlines())
    assert missing == {**missing, "event": "log_lines_lost", "level": "warning", "lines": lost}
    assert again["event"] == "again"
    cut = [line for line in whole if not line]
    assert len(cut) <= 1, "at most one line is incomplete"
    assert len(whole) - len(cut) == lines - lost


def _parsed(line: bytes) -> dict[str, object]:
    try:
        parsed: dict[str, object] = json.loads(line)
    except ValueError:
        return {}
    return parsed


def test_line_longer_than_pipe_buf_is_complete() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream, os.fdopen(read, "rb") as reader, logging_to(stream):
        structlog.get_logger().info("long", text="ü" * select.PIPE_BUF)
        os.set_blocking(read, False)
        assert json.loads(reader.read())["event"] == "long"
