"""Image sources of a request: five accepted forms, and refused values."""

import json
from typing import Any

import pytest

from generation_contracts import encode
from tests.contracts.senders import IMAGE, IMAGE_TO_TEXT, decode, refusal

# Names of files as people and programs make them; nothing is decoded.
ODD_KEYS = [
    "in/Zürich.png",
    "in/Zu\u0308rich.png",
    "in/2026-11-29T10:00:00.png",
    "a&b.png",
    " a b+c .png",
    "100%.png",
    "a%2fb",
    "a?versionId=1#b",
    'q"u<o>t|e^s`{x}[y];$.png',
    "日本/写真 🖼.png",
    "a\\b",
    "..a/b..c/...",
]
GOOD_IMAGES: list[Any] = [
    "s3://generation/a",
    "s3://a-b.c9/x/y z/(1)_@+,='!*~.png",
    {"bucket": "generation", "key": "x" * 1024},
    {"base64": "iVBORw0KGgo="},
    "data:image/png;base64,iVBORw0KGgo=",
    *(f"s3://Old_Bucket/{key}" for key in ODD_KEYS),
    *({"bucket": "generation", "key": key} for key in ODD_KEYS),
    {"bucket": "generation", "key": "é" * 512},
    "http://localhost:9000/a.png?x=1#y",
    "https://pictures.example/a.png",
]
BAD_IMAGES: list[Any] = [
    "file:///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "FILE:///etc/passwd",
    "ftp://host/a.png",
    "gopher://host/",
    "javascript:alert(1)",
    "",
    "s3://",
    "s3://generation",
    "s3://generation/",
    "s3://b/a",
    "s3://generation/a\n",
    "s3://user@generation/a",
    "s3:/generation/a",
    " s3://generation/a",
    "s3://generation/" + "x" * 2048,
    "http://",
    "http:/host",
    "https:host",
    "https://host/a b",
    "https://host/a\n",
    "https://hést/",
    "https://host/" + "x" * 2048,
    "data:image/png;base64,",
    "data:image/png;base64,iVBORw0KGgo=\n",
    "data:text/html;base64,aaaa",
    "data:image/png,aaaa",
    "data:,",
    {},
    {"bucket": "generation"},
    {"key": "a"},
    {"bucket": "generation", "key": ""},
    {"bucket": "generation", "key": "x" * 1025},
    {"bucket": "generation", "key": "a\tb"},
    {"bucket": "generation", "key": "a\u001bb"},
    {"bucket": "generation", "key": "a\u0000"},
    {"bucket": "generation", "key": "a\r\nb"},
    {"bucket": "generation", "key": "a\\..\\b"},
    {"bucket": "generation", "key": "a\x85b"},
    {"bucket": "generation", "key": "a//b"},
    {"bucket": "generation", "key": "/a"},
    {"bucket": "generation", "key": "a/"},
    {"bucket": "generation", "key": "a", "version": "1"},
    {"bucket": "../x", "key": "a"},
    {"bucket": "x" * 64, "key": "a"},
    {"base64": ""},
    {"base64": "not base64!"},
    {"base64": "aaaa\n"},
    {"base64": "aaaa", "key": "a"},
    {"url": "https://host/a.png"},
    {"type": "image_url", "image_url": {"url": "https://host/a.png"}},
    None,
    5,
    True,
    [],
    ["s3://generation/a"],
]
# The S3 client refuses such keys with a bare ValueError, a file system behind a store follows them.
DOT_SEGMENTS = ["..", ".", "../a", "a/../b", "a/./b", "a/..", "./a", "inputs/../private/a"]


@pytest.mark.parametrize("image", GOOD_IMAGES, ids=lambda image: str(image)[:32])
def test_every_form_of_an_image_is_accepted(image: Any) -> None:
    request = decode(IMAGE_TO_TEXT, {"images": [image]})
    assert json.loads(encode(request))["images"] == [image]


@pytest.mark.parametrize("image", BAD_IMAGES, ids=lambda image: ascii(str(image)[:32]))
def test_invalid_image_is_refused_by_its_index(image: Any) -> None:
    problems = refusal(IMAGE_TO_TEXT, {"images": [IMAGE, image]}).problems
    assert {p["field"].rpartition("images.1")[1] for p in problems} == {"images.1"}


def test_key_length_is_limited_in_bytes() -> None:
    """A schema counts characters."""
    key = "é" * 513
    for image in (f"s3://generation/{key}", {"bucket": "generation", "key": key}):
        text = str(refusal(IMAGE_TO_TEXT, {"images": [image]}))
        assert text.endswith("an object key has at most 1024 bytes of UTF-8")


@pytest.mark.parametrize("key", DOT_SEGMENTS)
def test_key_with_dot_segments_is_refused_in_both_forms(key: str) -> None:
    for image in (f"s3://generation/{key}", {"bucket": "generation", "key": key}):
        fields = [p["field"] for p in refusal(IMAGE_TO_TEXT, {"images": [image]}).problems]
        assert fields[0].startswith("images.0")
