"""Queues: their names, their metadata, and the choice of a queue by model."""

import itertools

import pytest

from generation_contracts import Subjects, Task, TextToImageRequest, decode_request, request_digest
from generation_contracts.queues import QueueInfo, default_queues, queue_for, queue_of_stream
from generation_contracts.subjects import require_queue_name

T2I, I2T = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT
SDXL = QueueInfo("sdxl", T2I, "stabilityai/sdxl-turbo")
FLUX = QueueInfo("flux", T2I, "black-forest-labs/FLUX.1-dev")
CAPTIONS = QueueInfo("captions", I2T, "Qwen/Qwen2.5-VL")
QUEUES = [*default_queues().values(), SDXL, FLUX, CAPTIONS]

UNUSABLE = [
    *("", "a" * 33, "-a", "a_b", "A", "a.b", "a b", "*", ">", "a\n", "é", "a/b"),
    *("advisories", "releases", "results", "retries", "uploads", str(I2T)),
]


@pytest.mark.parametrize("name", ["a", "sdxl-turbo", "0", "a" * 32, str(T2I)])
def test_a_usable_name_is_accepted(name: str) -> None:
    require_queue_name(name, T2I)


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|is)"):
        require_queue_name(name, T2I)


def test_no_two_queues_or_roots_share_a_stream() -> None:
    """The streams of the root `a.b` have the prefix `A_B_`, which a queue of `a` could produce."""
    names = ["b", "requests", "results", "a-b", "ab", "b-results", "advisories", "retries", "x"]
    roots = ["a", "a.requests", "a.advisories", "a.requests.b", "a.b", "a-b"]
    owners: dict[str, tuple[str, str]] = {}
    for root, name in itertools.product(roots, names):
        subjects = Subjects(root)
        try:
            require_queue_name(name, T2I)
        except ValueError:
            continue
        shared = (subjects.results_stream, subjects.retries_stream, subjects.releases_stream)
        shared += (subjects.dead_letters_stream, subjects.advisories_stream)
        own = (subjects.requests_stream(name), subjects.advisories_stream_of(name))
        for stream, owner in [(s, (root, "")) for s in shared] + [(s, (root, name)) for s in own]:
            assert owners.setdefault(stream, owner) == owner


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, str(T2I)),
        (str(T2I), str(T2I)),
        ("stabilityai/sdxl-turbo", "sdxl"),
        ("SDXL-Turbo", "sdxl"),
        ("flux", "flux"),
        ("FLUX.1-dev", "flux"),
        ("other", str(T2I)),  # the default queue has not declared its model
        ("captions", str(T2I)),  # a queue of another task
    ],
)
def test_the_queue_of_a_model(model: str | None, expected: str) -> None:
    found = queue_for(model, T2I, QUEUES)
    assert found is not None
    assert found.name == expected


def test_without_a_match_a_default_queue_that_declares_its_model_is_no_answer() -> None:
    declared = QueueInfo(str(T2I), T2I, "org/base")
    assert queue_for("other", T2I, [declared, SDXL]) is None
    assert queue_for("base", T2I, [declared, SDXL]) == declared


def test_the_default_queue_has_precedence() -> None:
    same = QueueInfo("a", T2I, "org/base")
    declared = QueueInfo(str(T2I), T2I, "org/base")
    assert queue_for("org/base", T2I, [same, declared]) == declared


def test_the_metadata_of_a_stream_name_its_queue() -> None:
    subjects = Subjects()
    config = {"name": subjects.requests_stream("sdxl"), "metadata": SDXL.metadata}
    assert queue_of_stream(config, subjects) == SDXL
    default = {"name": subjects.requests_stream(T2I)}
    assert queue_of_stream(default, subjects) == QueueInfo(str(T2I), T2I)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "GENERATION_REQUESTS_OTHER"},
        {"metadata": {}},
        {"metadata": {**SDXL.metadata, "generation.task": "text_to_smell"}},
        {"metadata": {**SDXL.metadata, "generation.queue": "a.b"}},
    ],
)
def test_another_stream_is_no_queue(change: dict[str, object]) -> None:
    subjects = Subjects()
    config = {"name": subjects.requests_stream("sdxl"), "metadata": SDXL.metadata}
    assert queue_of_stream({**config, **change}, subjects) is None


def test_the_model_is_content_and_its_absence_changes_no_digest() -> None:
    plain = TextToImageRequest(prompt="a red circle")
    assert request_digest(plain) == request_digest(
        decode_request(T2I, b'{"prompt":"a red circle"}')
    )
    assert request_digest(plain) == (
        "sha256:4ea2a03c00d6b9d4ef3ed359f386cce4b713dccd2e96a36c0963bc9ff5ec619c"
    )
    named = plain.model_copy(update={"model": "a"})
    assert request_digest(named) != request_digest(plain)
    assert request_digest(named) != request_digest(plain.model_copy(update={"model": "b"}))


def test_a_task_without_a_default_queue_needs_a_name_unless_it_has_one_queue() -> None:
    one, two = QueueInfo("one", Task.CUSTOM), QueueInfo("two", Task.CUSTOM, "org/two")
    same = QueueInfo("custom", Task.CUSTOM)
    assert queue_for(None, Task.CUSTOM, []) is None
    assert queue_for(None, Task.CUSTOM, [one]) == one
    assert queue_for(None, Task.CUSTOM, [one, two]) is None
    assert queue_for(None, Task.CUSTOM, [one, two, same]) == same
    assert queue_for("two", Task.CUSTOM, [one, two]) == two
    assert queue_for("org/two", Task.CUSTOM, [one, two]) == two
    assert queue_for("other", Task.CUSTOM, [one]) is None
    assert queue_for("one", Task.TEXT_TO_IMAGE, [one]) == QueueInfo("text_to_image", T2I)
