"""Every field of a request: values of a wrong type, at the limits, and beyond the limits."""

from datetime import datetime
from typing import Any

import pytest

from generation_contracts import ImageToTextRequest, Task, TextToImageRequest
from tests.contracts.senders import IMAGE, IMAGE_TO_TEXT, TEXT_TO_IMAGE, decode, refusal

TEXT = ("text", [5, True, ["x"], {"x": "x"}])
WHOLE = ("whole number", ["512", 512.0, 512.5, True, [512], {}])
NUMBER = ("number", ["1.5", True, [1.5], {}])
FLAG = ("flag", ["true", 1, 0, "yes", []])

TYPES: list[tuple[Task, str, tuple[str, list[Any]]]] = [
    (TEXT_TO_IMAGE, "prompt", TEXT),
    (TEXT_TO_IMAGE, "negative_prompt", TEXT),
    (TEXT_TO_IMAGE, "width", WHOLE),
    (TEXT_TO_IMAGE, "height", WHOLE),
    (TEXT_TO_IMAGE, "num_inference_steps", WHOLE),
    (TEXT_TO_IMAGE, "steps", WHOLE),
    (TEXT_TO_IMAGE, "guidance_scale", NUMBER),
    (TEXT_TO_IMAGE, "num_images", ("whole number", [*WHOLE[1], None])),
    (TEXT_TO_IMAGE, "seed", WHOLE),
    (TEXT_TO_IMAGE, "output_format", ("format", ["PNG", "gif", "", 5, None])),
    (
        TEXT_TO_IMAGE,
        "adapters",
        ("map", [[], "pencil", 5, None, {"a": "1"}, {"a": None}, {"a": True}, {"a": [1]}]),
    ),
    (TEXT_TO_IMAGE, "preview", ("flag", [*FLAG[1], None])),
    (IMAGE_TO_TEXT, "prompt", TEXT),
    (IMAGE_TO_TEXT, "images", ("list", [IMAGE, {}, 5, None, {"0": IMAGE}])),
    (IMAGE_TO_TEXT, "system", TEXT),
    (IMAGE_TO_TEXT, "max_new_tokens", WHOLE),
    (IMAGE_TO_TEXT, "temperature", NUMBER),
    (IMAGE_TO_TEXT, "top_p", NUMBER),
    (IMAGE_TO_TEXT, "top_k", WHOLE),
    (IMAGE_TO_TEXT, "repetition_penalty", NUMBER),
    (IMAGE_TO_TEXT, "seed", WHOLE),
    (IMAGE_TO_TEXT, "stream", ("flag", [*FLAG[1], None])),
    *(
        (task, field, wrong)
        for task in Task
        for field, wrong in {
            "request_id": TEXT,
            "reply_to": TEXT,
            "deadline": ("time", [1767323045, 1.5, True, [], "soon", "2026-01-02", ""]),
            "metadata": ("map", [[], "x", 5, None, {"k": 5}, {"k": None}, {"k": ["v"]}]),
            "model": TEXT,
            "then": ("list", [{}, "x", 5, None, [5], ["x"], [{}], [[]]]),
            "chain": ("link", [[], "x", 5, {"id": "a"}, {"step": 1}, {"id": 5, "step": 1}]),
        }.items()
    ),
]

LIMITS: list[tuple[Task, str, list[Any], list[Any]]] = [  # the last good ones, the first bad ones
    (TEXT_TO_IMAGE, "prompt", ["x", "x" * 8_000], ["", " \t\n", "x" * 8_001]),
    (TEXT_TO_IMAGE, "negative_prompt", ["", "x" * 8_000], ["x" * 8_001]),
    (TEXT_TO_IMAGE, "width", [16, 4096], [15, 4097, 100_000, 0, -512, 10**400]),
    (TEXT_TO_IMAGE, "height", [16, 4096], [15, 4097]),
    (TEXT_TO_IMAGE, "num_inference_steps", [1, 200], [0, 201]),
    (TEXT_TO_IMAGE, "steps", [1, 200], [0, 201]),
    (TEXT_TO_IMAGE, "guidance_scale", [0, 7, 100.0], [-0.1, 100.1]),
    (TEXT_TO_IMAGE, "num_images", [1, 8], [0, 9]),
    (TEXT_TO_IMAGE, "seed", [0, 2**32 - 1], [-1, 2**32]),
    (
        TEXT_TO_IMAGE,
        "adapters",
        [{}, {"a": -4, "B_-9": 4.0, "x" * 64: 0, "0": 0.5}],
        [
            {"a": -4.01},
            {"a": 4.01},
            {"": 1},
            {"x" * 65: 1},
            {"-a": 1},
            {"a.b": 1},
            {"../a": 1},
            {"a/b": 1},
            {"a\n": 1},
            {str(n): 1 for n in range(5)},
        ],
    ),
    (IMAGE_TO_TEXT, "images", [[IMAGE], [IMAGE] * 16], [[], [IMAGE] * 17]),
    (IMAGE_TO_TEXT, "system", ["", "x" * 8_000], ["x" * 8_001]),
    (IMAGE_TO_TEXT, "max_new_tokens", [1, 8192], [0, 8193]),
    (IMAGE_TO_TEXT, "temperature", [0, 10], [-0.1, 10.1]),
    (IMAGE_TO_TEXT, "top_p", [1e-9, 1], [0, 1.001]),
    (IMAGE_TO_TEXT, "top_k", [1, 1000], [0, 1001]),
    (IMAGE_TO_TEXT, "repetition_penalty", [0.01, 10], [0, 1e-9, 10.1]),
    *(
        (task, field, good, bad)
        for task in Task
        for field, good, bad in [
            (
                "request_id",
                ["a", "A-z_0", "x" * 64],
                ["", "x" * 65, "a.b", "a\n", "\na", "*", ">", "a b", "é", "a/b", "$a", "a\u0000"],
            ),
            (
                "reply_to",
                ["_INBOX.a.b", "x" * 200],
                ["", "x" * 201, "x" * 5_000, "a.", ".a", "a..b", "a.*", "a.>", "$JS.API.X", "a\n"],
            ),
            (
                "deadline",
                ["2030-01-02T03:04:05Z", "2030-01-02T03:04:05.5+02:00"],
                ["2030-01-02T03:04:05", "2030-13-02T03:04:05Z", "1767323045"],
            ),
            (
                "metadata",
                [{}, {"k" * 64: "v" * 512}, {str(n): "" for n in range(16)}],
                [{"": "v"}, {"k" * 65: "v"}, {"k": "v" * 513}, {str(n): "" for n in range(17)}],
            ),
            ("model", ["x", "x" * 200], ["", "x" * 201]),
            (
                "then",
                [[], [{"task": "text_to_image", "prompt": "$text"}] * 8],
                [
                    [{"task": "text_to_image", "prompt": "$text"}] * 9,
                    [{"prompt": "x"}],
                    [{"task": "text_to_speech", "prompt": "x"}],
                    [{"task": "text_to_image", "prompt": "x", "request_id": "a"}],
                    [{"task": "image_to_text", "prompt": "x", "images": []}],
                    [{"task": "image_to_text", "prompt": "x", "images": "$text"}],
                ],
            ),
            (
                "chain",
                [
                    {"id": "a", "step": 1, "branch": ""},
                    {"id": "x" * 64, "step": 9, "branch": "0-12"},
                ],
                [
                    {"id": "a.b", "step": 1},
                    {"id": "a", "step": 0},
                    {"id": "a", "step": 10},
                    {"id": "a", "step": 1, "branch": "-1"},
                    {"id": "a", "step": 1, "branch": "1-" * 12 + "1"},
                    {"id": "a", "step": 1, "of": 2},
                ],
            ),
        ]
    ),
]


def flat(rows: list[tuple[Task, str, list[Any]]]) -> list[Any]:
    return [
        pytest.param(task, field, value, id=f"{task}-{field}-{str(value)[:24]!a}")
        for task, field, values in rows
        for value in values
    ]


@pytest.mark.parametrize(
    ("task", "field", "value"), flat([(task, field, values) for task, field, (_, values) in TYPES])
)
def test_value_of_a_wrong_type_is_refused_at_its_field(task: Task, field: str, value: Any) -> None:
    problems = refusal(task, {field: value}).problems
    assert [p["field"].split(".")[0] for p in problems] == [field]


@pytest.mark.parametrize(
    ("task", "field", "value"), flat([(task, field, bad) for task, field, _, bad in LIMITS])
)
def test_value_past_its_limit_is_refused_at_its_field(task: Task, field: str, value: Any) -> None:
    problems = refusal(task, {field: value}).problems
    assert {p["field"].split(".")[0] for p in problems} == {field}


@pytest.mark.parametrize(
    ("task", "field", "value"), flat([(task, field, good) for task, field, good, _ in LIMITS])
)
def test_value_at_its_limit_is_accepted(task: Task, field: str, value: Any) -> None:
    name = "num_inference_steps" if field == "steps" else field
    actual = decode(task, {field: value}).model_dump(mode="json")[name]
    if field == "deadline":
        assert datetime.fromisoformat(actual) == datetime.fromisoformat(value)
    elif field == "then":
        assert len(actual) == len(value)
    else:
        assert actual == value


def test_tables_cover_every_field() -> None:
    tested = {(task, field) for task, field, _ in TYPES}
    bounded = {(task, field) for task, field, _, _ in LIMITS}
    for task, model in ((TEXT_TO_IMAGE, TextToImageRequest), (IMAGE_TO_TEXT, ImageToTextRequest)):
        fields = {(task, field) for field in model.model_fields}
        assert fields <= tested
        unbounded = {"output_format", "preview", "stream", "seed", "prompt"}
        assert {f for f in fields if f[1] not in unbounded} <= bounded
