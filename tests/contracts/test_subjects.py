"""Subjects and streams: their names, and the validation of ids, roots and reply subjects."""

import pytest

from generation_contracts import Subjects, Task, UnsafeReplySubject
from generation_contracts.subjects import is_request_id

TEXT_TO_IMAGE, IMAGE_TO_TEXT, CUSTOM = Task
PREFIXES = ("_INBOX.", "generation.reply.")
BAD_IDS = [
    "",
    "a.b",
    "a\n",
    "*",
    ">",
    "a b",
    "é",
    "x" * 65,
    "a/b",
    "$JS",
    "a\u0000",
    "..",
    "\u0661",
]


def test_subjects_have_their_documented_names() -> None:
    subjects = Subjects()
    assert subjects.request(TEXT_TO_IMAGE) == "generation.request.text_to_image"
    assert subjects.request(TEXT_TO_IMAGE, "a-1") == "generation.request.text_to_image.a-1"
    assert subjects.request_subjects(IMAGE_TO_TEXT) == (
        "generation.request.image_to_text",
        "generation.request.image_to_text.*",
    )
    assert subjects.result(TEXT_TO_IMAGE, "a-1") == "generation.result.text_to_image.a-1"
    assert subjects.progress(IMAGE_TO_TEXT, "a-1") == "generation.progress.image_to_text.a-1"
    assert subjects.dead_letter(TEXT_TO_IMAGE) == "generation.dead.text_to_image"
    assert subjects.call(TEXT_TO_IMAGE) == "generation.call.text_to_image"
    assert subjects.releases(TEXT_TO_IMAGE) == "generation.released.text_to_image"
    assert subjects.cancellation_marks(TEXT_TO_IMAGE) == "generation.withdrawn.text_to_image"
    assert subjects.retry(TEXT_TO_IMAGE, "a-1") == "generation.retry.text_to_image.a-1"
    assert subjects.cancel("a-1") == "generation.cancel.a-1"


def test_streams_have_their_documented_names() -> None:
    subjects = Subjects()
    assert subjects.requests_stream(TEXT_TO_IMAGE) == "GENERATION_REQUESTS_TEXT_TO_IMAGE"
    assert subjects.requests_stream(IMAGE_TO_TEXT) == "GENERATION_REQUESTS_IMAGE_TO_TEXT"
    assert subjects.results_stream == "GENERATION_RESULTS"
    assert subjects.dead_letters_stream == "GENERATION_DEAD_LETTERS"
    assert subjects.releases_stream == "GENERATION_RELEASES"
    assert subjects.retries_stream == "GENERATION_RETRIES"
    assert subjects.advisories_stream == "GENERATION_ADVISORIES"


def test_root_is_in_every_subject_and_stream() -> None:
    subjects = Subjects("team-a.images")
    assert subjects.result(TEXT_TO_IMAGE, "a") == "team-a.images.result.text_to_image.a"
    assert subjects.requests_stream(TEXT_TO_IMAGE) == "TEAM-A_IMAGES_REQUESTS_TEXT_TO_IMAGE"


@pytest.mark.parametrize("root", ["g", "x" * 24, "team-a.generation", "a.b.c-d"])
def test_valid_root_is_accepted(root: str) -> None:
    assert Subjects(root).call(TEXT_TO_IMAGE) == f"{root}.call.text_to_image"


@pytest.mark.parametrize(
    "root",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "*",
        "a.*",
        ">",
        "a.>",
        "$JS.API",
        "a b",
        "a\n",
        "é",
        "a_b",
        "A",
        "x" * 25,
    ],
)
def test_invalid_root_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="subject root"):
        Subjects(root)


@pytest.mark.parametrize("bad", BAD_IDS)
def test_invalid_id_is_refused_in_a_subject(bad: str) -> None:
    subjects = Subjects()
    assert not is_request_id(bad)
    for build in (
        lambda: subjects.request(TEXT_TO_IMAGE, bad),
        lambda: subjects.result(TEXT_TO_IMAGE, bad),
        lambda: subjects.progress(TEXT_TO_IMAGE, bad),
        lambda: subjects.cancel(bad),
    ):
        with pytest.raises(ValueError, match="request id"):
            build()


@pytest.mark.parametrize("good", ["a", "A-z_09", "x" * 64, "-", "_"])
def test_id_is_read_from_its_subject(good: str) -> None:
    subjects = Subjects()
    assert is_request_id(good)
    assert subjects.id_in(subjects.request(TEXT_TO_IMAGE, good), TEXT_TO_IMAGE) == good


@pytest.mark.parametrize(
    "subject",
    [
        "generation.request.text_to_image",
        "generation.request.image_to_text.a",
        "generation.request.text_to_image_2.a",
        "generation.result.text_to_image.a",
        "other.generation.request.text_to_image.a",
        "",
    ],
)
def test_other_subjects_have_no_id(subject: str) -> None:
    assert Subjects().id_in(subject, TEXT_TO_IMAGE) is None


@pytest.mark.parametrize(
    "reply", ["_INBOX.a", "_INBOX.a.b-c_1", "generation.reply.x", "generation.reply.x.y"]
)
def test_reply_subject_with_an_allowed_prefix_is_accepted(reply: str) -> None:
    Subjects().check_reply(reply, PREFIXES)


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.API.STREAM.DELETE.GENERATION_REQUESTS_TEXT_TO_IMAGE",
        "$JS.ACK.x",
        "$SYS.REQ.SERVER.PING",
        "_INBOX." + "a" * 5_000,
        "_INBOX." + "a" * 194,
        "_INBOX.*",
        "_INBOX.>",
        "_INBOX.",
        "_INBOX..a",
        "_INBOX.a.",
        "_INBOX.a\n",
        "_INBOX.a\r\nPUB x 0",
        "_INBOX.a b",
        "_INBOX.\u00e9",
        "_INBOX.a\u0000",
        "",
        "*",
        ">",
        "_INBOX",
        "_INBOXES.a",
        "other.a",
        "generation.reply",
    ],
    ids=lambda reply: ascii(reply[:30]),
)
def test_unsafe_reply_subject_is_refused_without_repeating_it(reply: str) -> None:
    with pytest.raises(UnsafeReplySubject) as caught:
        Subjects().check_reply(reply, PREFIXES)
    assert len(reply) < 8 or reply not in str(caught.value)


def test_longest_reply_subject_is_accepted() -> None:
    Subjects().check_reply("_INBOX." + "a" * 193, PREFIXES)


@pytest.mark.parametrize("root", ["generation", "team-a.images"])
def test_subject_of_the_daemon_is_never_a_reply_subject(root: str) -> None:
    subjects = Subjects(root)
    for reply in (
        root,
        subjects.request(TEXT_TO_IMAGE),
        subjects.request(TEXT_TO_IMAGE, "a"),
        subjects.result(TEXT_TO_IMAGE, "a"),
        subjects.progress(TEXT_TO_IMAGE, "a"),
        subjects.dead_letter(TEXT_TO_IMAGE),
        subjects.call(TEXT_TO_IMAGE),
        subjects.cancel("a"),
        f"{root}.reply_2.a",
    ):
        with pytest.raises(UnsafeReplySubject):
            subjects.check_reply(reply, ("", root, f"{root}."))
    subjects.check_reply(f"{root}.reply.a", (f"{root}.reply.",))
    subjects.check_reply(f"{root}_2.a", (f"{root}_2.",))


def test_no_reply_subject_is_accepted_without_prefixes() -> None:
    with pytest.raises(UnsafeReplySubject):
        Subjects().check_reply("_INBOX.a", ())
