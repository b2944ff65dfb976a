"""Images of a sender: their forms, and how they are scaled to fit into a request."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from consumer.media.codec import ImageCodec
from consumer.settings import Settings
from generation_client import RequestInvalid, images, submitting
from generation_client.images import each_image, fitted, inline, inline_size, media_type, scaled
from generation_contracts import ImageToTextRequest, encode

FAST: dict[str, Any] = {"compress_level": 1, "method": 0}  # of the encoders
STREAMS = Path(__file__).parents[2] / "infra" / "nats" / "streams"


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    shape = (*reversed(size), len(Image.new(mode, (1, 1)).getbands()))
    values = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def opened(data: bytes | None) -> Image.Image:
    assert data is not None
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_limits_are_those_of_the_daemon() -> None:
    assert Settings.model_fields["model_max_image_pixels"].default == images.MAX_PIXELS
    for task in ("TEXT_TO_IMAGE", "IMAGE_TO_TEXT"):
        stream = json.loads((STREAMS / f"GENERATION_REQUESTS_{task}.json").read_text())
        assert stream["max_msg_size"] == submitting.MAX_REQUEST


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_large_image_is_scaled_to_the_pixels_of_a_worker(kind: str) -> None:
    data = file_of(noise((1800, 1350)), kind, **FAST)
    small = opened(scaled(data))
    assert small.format == "JPEG"
    assert 0.98 * images.MAX_PIXELS < small.width * small.height <= images.MAX_PIXELS
    assert small.width / small.height == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_image_is_seen_as_the_worker_sees_the_file(orientation: int) -> None:
    picture = Image.new("RGB", (2000, 1500), "white")
    picture.paste("red", (0, 0, 1000, 400))
    picture.paste(noise((900, 900)), (1050, 550))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = file_of(picture, "JPEG", exif=exif, quality=95)
    codec = ImageCodec(max_bytes=20 * 2**20, max_pixels=16_000_000)
    small = scaled(data)
    assert small is not None
    whole, seen = codec.decode(data), codec.decode(small)
    assert (whole.width > whole.height) == (seen.width > seen.height)
    difference = np.abs(
        np.asarray(whole.resize((64, 64), Image.Resampling.BOX), int)
        - np.asarray(seen.resize((64, 64), Image.Resampling.BOX), int)
    )
    assert difference.mean() < 4


def test_the_colour_profile_stays() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = file_of(noise((1500, 1500)), "JPEG", icc_profile=profile, quality=95)
    assert opened(scaled(data)).info["icc_profile"] == profile


def test_transparent_parts_become_white() -> None:
    picture = noise((1200, 1200), "RGBA")
    picture.paste((255, 0, 0, 0), (0, 0, 1200, 600))
    small = opened(scaled(file_of(picture, "PNG", **FAST)))
    assert all(value > 250 for value in small.getpixel((200, 200)))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "data",
    [
        file_of(noise((1500, 1500), "CMYK"), "JPEG"),
        file_of(Image.new("I;16", (2000, 2000)), "PNG"),
        file_of(noise((512, 512)), "JPEG", quality=5),
        b"\xff\xd8\xff broken",
        b"GIF89a",
    ],
    ids=["CMYK", "16 bits", "small already", "broken", "other format"],
)
def test_other_files_are_not_scaled(data: bytes) -> None:
    assert scaled(data) is None


def test_nothing_is_scaled_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert scaled(b"\xff\xd8\xff") is None


def test_files_that_fit_stay_unchanged() -> None:
    files = {0: b"a" * 300, 2: b"b" * 300}
    assert fitted(files, 2_000) == files
    assert fitted(files, -1) == {0: None, 2: None}


def test_the_largest_file_is_scaled_first_and_what_does_not_fit_is_left_out() -> None:
    large = file_of(noise((400, 300)).resize((1600, 1200), Image.Resampling.BICUBIC), "PNG", **FAST)
    small = b"b" * 1_000
    assert len(large) > 1_500_000
    room = 900_000
    chosen = fitted({0: small, 1: large}, room)
    assert chosen[0] == small
    assert chosen[1] is not None
    assert len(chosen[1]) < len(large)
    without_room = fitted({0: small, 1: large}, 2_000)
    assert without_room == {0: small, 1: None}


def test_the_size_of_an_inline_image_is_exact() -> None:
    empty = ImageToTextRequest(prompt="a", images=("s3://bucket/key",))
    empty = empty.model_copy(update={"images": ()})
    for data in (b"a", b"ab", b"abc", b"abcd"):
        whole = empty.model_copy(update={"images": (inline(data), inline(data))})
        assert len(encode(whole)) == len(encode(empty)) + 2 * inline_size(data) - 1  # a comma less


def test_the_media_type_is_found_in_the_bytes() -> None:
    for kind in ("png", "jpeg", "webp"):
        assert media_type(file_of(noise((8, 8)), kind.upper())) == f"image/{kind}"
    for other in (b"", b"GIF89a", b"RIFF1234WAVE", b"%PDF"):
        with pytest.raises(RequestInvalid, match="not a PNG, JPEG or WebP file"):
            media_type(other)


def test_one_image_counts_as_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"the file")
    assert list(each_image(path)) == [b"the file"]
    assert list(each_image("s3://bucket/key")) == ["s3://bucket/key"]
    assert list(each_image([b"a", path, "s3://bucket/key"])) == [
        *(b"a", b"the file"),
        "s3://bucket/key",
    ]
    with pytest.raises(RequestInvalid, match=r"absent\.png: No such file"):
        list(each_image(tmp_path / "absent.png"))
