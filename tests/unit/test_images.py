"""The image codec: accepted and refused inputs, and encoded outputs."""

import hashlib
import json
import re
import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops, ImageFile, PngImagePlugin

from consumer.media.codec import MAX_VALUE_LENGTH, ImageCodec, jpeg_parts, png_parts, webp_parts
from consumer.ports.media import InputUnavailable, OutputFormat
from tests.support.odd_images import (
    BLUE,
    ODD_IMAGES,
    RED,
    WHITE,
    as_file,
    exif_of,
    in_jpeg,
    in_png,
    photograph,
    png_chunk,
    png_file,
    srgb_profile,
    webp,
    xmp_of,
)

CODEC = ImageCodec()
unhurried = settings(deadline=None)  # a slow machine is no failure
FORMATS = ("PNG", "JPEG", "WEBP")


def near(actual: Any, expected: tuple[int, int, int], tolerance: int = 3) -> bool:
    return all(abs(a - e) <= tolerance for a, e in zip(actual, expected, strict=True))


def refusal(data: bytes, codec: ImageCodec = CODEC) -> str:
    with pytest.raises(InputUnavailable) as raised:
        codec.decode(data)
    return str(raised.value)


# -- odd files ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # metadata of a file causes no warning of Pillow
@pytest.mark.parametrize("name", ODD_IMAGES)
def test_unusual_file_is_decoded_or_refused_with_a_message(name: str) -> None:
    odd = ODD_IMAGES[name]
    data = odd.make()
    if isinstance(odd.expected, str):
        assert refusal(data) == odd.expected
        return
    decoded, expected = CODEC.decode(data), odd.expected()
    assert (decoded.mode, decoded.size, decoded.info) == ("RGB", expected.size, {})
    differences = ImageChops.difference(decoded, expected).getextrema()
    assert max(most for _, most in differences) <= odd.tolerance


def test_documentation_lists_every_error_message() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/inputs.md").read_text("utf-8")
    table, names = page.partition("## Refusals")[2].split("FORMAT: ")
    named = {name.strip(" .\n") for name in names.replace("\n", " ").split(", ")}
    messages = {odd.expected for odd in ODD_IMAGES.values() if isinstance(odd.expected, str)}
    messages |= {
        refusal(data, ImageCodec(max_bytes=20_000, max_pixels=100)) for data in over_limits()
    }
    messages |= {refusal(data) for data in over_limits()[1:]}
    templates, formats = set(), set()
    for words in messages:
        if other := re.fullmatch(r"the image is (.+); PNG, JPEG and WebP are read", words):
            formats.add(other[1])
            words = words.replace(other[1], "FORMAT")  # noqa: PLW2901 - the template of the words
        templates.add(re.sub(r"\b\d+\b", "N", words))
    assert set(re.findall(r"^\| `(the image .+?)` \|", table, re.MULTILINE)) == templates
    assert named == formats


def over_limits() -> list[bytes]:
    """Return a file beyond each limit: bytes, pixels, sides, aspect ratio, and number of parts."""
    return [
        bytes(20_001),
        png_file(60_000, 60_000, bytes(100)),
        as_file(Image.new("1", (16_385, 84))),
        as_file(Image.new("L", (4, 3))),
        as_file(Image.new("L", (801, 4))),
        in_png(png_chunk(b"teXt", b"") * 20_010),
        webp()[:4] + bytes(4) + webp()[8:12] + b"junk\0\0\0\0" * 20_010,
    ]


def test_pillow_gets_only_the_parts_needed_for_decoding() -> None:
    secret = b"a secret in the metadata"
    exif, xmp = exif_of(6) + secret, xmp_of(6) + secret
    files = (
        png_parts.png_parts(
            in_png(
                png_chunk(b"tEXt", b"a\0" + secret),
                png_chunk(b"eXIf", exif),
                png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
            )
            + secret
        ),
        jpeg_parts.jpeg_parts(
            in_jpeg(
                (0xFE, secret),
                (0xE1, b"Exif\0\0" + exif),
                (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp),
                (0xEE, secret),
            )
            + secret
        ),
        webp_parts.webp_parts(webp(exif=exif, xmp=xmp, icc_profile=srgb_profile()) + secret),
    )
    for parts in files:
        assert secret not in parts.file
        assert secret in parts.exif
        assert secret in parts.xmp
        with Image.open(BytesIO(parts.file)) as opened:
            opened.load()
            assert not opened.info.keys() & {"exif", "xmp", "icc_profile", "comment"}


# -- accepted files -------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_three_formats_decode_to_rgb(file_format: str) -> None:
    decoded = CODEC.decode(as_file(photograph(), file_format))
    assert (decoded.mode, decoded.size) == ("RGB", (40, 24))
    assert near(decoded.getpixel((30, 3)), RED, 20)
    assert near(decoded.getpixel((30, 20)), BLUE, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", FORMATS)
def test_every_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored rotated left; the EXIF orientation rotates it right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = photograph() if turn_back is None else photograph().transpose(turn_back)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lossless = {"lossless": True} if file_format == "WEBP" else {"quality": 95, "subsampling": 0}

    decoded = CODEC.decode(as_file(stored, file_format, exif=exif, **lossless))

    assert decoded.size == (40, 24)
    assert near(decoded.getpixel((2, 2)), WHITE, 12)
    assert near(decoded.getpixel((37, 2)), RED, 12)
    assert near(decoded.getpixel((37, 21)), BLUE, 12)


def test_transparent_image_is_composited_over_white() -> None:
    image = Image.new("RGBA", (10, 10), (*RED, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))
    decoded = CODEC.decode(as_file(image))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == WHITE
    assert near(decoded.getpixel((1, 0)), (204, 204, 204), 1)
    assert decoded.getpixel((9, 9)) == RED


def test_transparent_webp_is_composited_over_white() -> None:
    image = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    image.paste((*RED, 255), (5, 0, 10, 10))
    decoded = CODEC.decode(as_file(image, "WEBP", lossless=True, exact=True))
    assert (decoded.getpixel((0, 0)), decoded.getpixel((9, 9))) == (WHITE, RED)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_other_png_modes_are_converted_to_rgb(mode: str) -> None:
    image = photograph().convert(mode)
    decoded = CODEC.decode(as_file(image))
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == image.convert("RGB").tobytes()


def test_decoded_image_has_no_metadata() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a prompt")
    decoded = CODEC.decode(as_file(photograph(), pnginfo=text, dpi=(72, 72)))
    assert decoded.info == {}


# -- rejected files -------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_truncated_file_is_refused_at_every_length(file_format: str) -> None:
    """A file without its last bytes may be accepted only if it decodes to all pixels."""
    data = as_file(photograph(), file_format)
    whole = CODEC.decode(data).tobytes()
    refused = 0
    for length in range(len(data)):
        try:
            assert CODEC.decode(data[:length]).tobytes() == whole
        except InputUnavailable:
            refused += 1
    assert refused >= len(data) - 21  # what ends a PNG: zlib's checksum, the chunk's, and IEND
    assert refusal(data[: len(data) // 2]) in {
        "the image is broken or incomplete",
        "the image is not a readable PNG, JPEG or WebP file",
    }


def test_pillow_setting_for_truncated_files_stays_off() -> None:
    refusal(as_file(photograph())[:80])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_png_header_with_60000_pixels_per_side_is_refused() -> None:
    data = png_file(60_000, 60_000, b"\0" * 100)
    assert len(data) < 100
    assert refusal(data) == "the image has more than 16000000 pixels"


@pytest.mark.parametrize("side", [6_000, 10_000])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bomb_is_refused_by_its_header(side: int, action: Any) -> None:
    """Whatever the process does with Pillow's warning, which begins at 89 million pixels."""
    data = png_file(side, side, b"\0" * (side // 8 + 1) * side)
    assert len(data) < 15_000
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        assert refusal(data) == "the image has more than 16000000 pixels"
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data)) as bomb:
            bomb.load()  # it is one: this takes a byte a pixel


def test_image_over_the_pixel_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def noted(image: ImageFile.ImageFile) -> Any:
        loaded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    codec = ImageCodec(max_pixels=100)
    for file_format in FORMATS:
        refusal(as_file(photograph(), file_format), codec)
    codec.decode(as_file(photograph(10, 10)))
    assert set(loaded) == {(10, 10)}


def test_webp_header_with_a_huge_canvas_is_refused() -> None:
    frame = as_file(photograph(), "WEBP")[12:]
    side = (16_382).to_bytes(3, "little")
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + side + side
    body = b"WEBP" + canvas + frame
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    assert refusal(data) == "the image has more than 16000000 pixels"


def test_pixel_limit_is_exact() -> None:
    codec = ImageCodec(max_pixels=40 * 24)
    assert codec.decode(as_file(photograph())).size == (40, 24)
    assert refusal(as_file(photograph(41, 24)), codec) == "the image has more than 960 pixels"


def test_byte_limit_is_exact() -> None:
    data = as_file(photograph())
    codec = ImageCodec(len(data))
    assert codec.max_bytes == len(data)
    assert codec.decode(data).size == (40, 24)
    assert refusal(data + b"\0", codec) == f"the image has more than {len(data)} bytes"


def test_image_with_a_long_side_is_refused() -> None:
    codec = ImageCodec(max_side=50)
    assert codec.decode(as_file(photograph(50, 8))).size == (50, 8)
    assert (
        refusal(as_file(photograph(8, 51)), codec) == "the image has a side of more than 50 pixels"
    )


def test_image_with_a_short_side_is_refused() -> None:
    assert CODEC.decode(as_file(Image.new("RGB", (4, 4)))).size == (4, 4)
    assert refusal(as_file(Image.new("RGB", (4, 3)))) == (
        "the image has a side of less than 4 pixels"
    )


def test_image_with_an_extreme_aspect_ratio_is_refused() -> None:
    assert CODEC.decode(as_file(Image.new("RGB", (4, 800)))).size == (4, 800)
    assert refusal(as_file(Image.new("RGB", (801, 4)))) == (
        "the image has sides of more than 1 to 200"
    )


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"<!DOCTYPE html><title>not found</title>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
        b"\xff\xd8\xff" + b"\0" * 64,
        b"RIFF\x40\0\0\0WEBPVP8 " + b"\0" * 64,
        b"GIF89a" + as_file(photograph()),
        b"\0" + as_file(photograph()),
    ],
    ids=["svg", "html", "eps", "png", "jpeg", "webp", "gif-before-png", "byte-before-png"],
)
def test_file_with_only_a_valid_signature_is_refused(data: bytes) -> None:
    assert refusal(data).startswith("the image is ")


def test_damaged_png_is_refused() -> None:
    data = bytearray(as_file(photograph()))
    data[data.index(b"IDAT") + 12] ^= 0xFF
    assert refusal(bytes(data)) == "the image is broken or incomplete"


def test_jpeg_with_too_many_segments_is_refused() -> None:
    few, many = (in_jpeg(*[(0xE9, b"Exif\0\0ab")] * count) for count in (4_900, 5_010))
    assert CODEC.decode(few).size == (40, 24)
    assert refusal(many) == "the image has too many JPEG segments"


def test_png_with_too_many_chunks_is_refused() -> None:
    few, many = (in_png(png_chunk(b"teXt", b"") * count) for count in (19_900, 20_010))
    assert CODEC.decode(few).size == (40, 24)
    assert refusal(many) == "the image has too many PNG chunks"


def test_webp_with_too_many_chunks_is_refused() -> None:
    data = webp()
    few, many = (
        data[:4] + bytes(4) + data[8:12] + b"junk\0\0\0\0" * count + data[12:]
        for count in (19_900, 20_010)
    )
    assert CODEC.decode(few).size == (40, 24)
    assert refusal(many) == "the image has too many WebP chunks"


@pytest.mark.parametrize("name", ["iCCP", "zTXt", "iTXt"])
def test_png_metadata_is_inflated_at_most_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of what they become; the texts are broken, which Pillow does not count."""
    inflated: list[int] = []
    inflate = zlib.decompressobj

    def noted() -> Any:
        inflated.append(1)
        return inflate()

    monkeypatch.setattr(zlib, "decompressobj", noted)
    beginning = {"iCCP": b"x\0\0", "zTXt": b"x\0\0", "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}
    body = beginning[name] + zlib.compress(bytes(2**20))[:-4] + b"oddd"
    assert CODEC.decode(in_png(png_chunk(name.encode(), body) * 1_000)).size == (40, 24)
    assert len(inflated) <= 1


def test_error_message_contains_no_local_path(tmp_path: Path) -> None:
    for data in (b"x", as_file(photograph())[:60], as_file(photograph(), "GIF")):
        assert "/" not in refusal(data)
        assert "object at" not in refusal(data)


@unhurried
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    refusal(data)


SEEDS = (
    *(as_file(photograph(), file_format) for file_format in FORMATS),
    as_file(photograph(), "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    as_file(photograph().convert("P"), transparency=0),
    as_file(photograph(), "MPO", save_all=True, append_images=[photograph()]),
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about broken EXIF
@unhurried
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_decode_or_are_refused(seed: bytes, damage: list[tuple[int, int]]) -> None:
    data = bytearray(seed)
    for position, value in damage:
        data[position % len(data)] = value
    try:
        decoded = CODEC.decode(bytes(data))
    except InputUnavailable:
        return
    assert (decoded.mode, decoded.info) == ("RGB", {})


# -- what is written ------------------------------------------------------------------------------


def test_png_is_lossless() -> None:
    encoded = CODEC.encode(photograph(), "png", seed=7)
    assert CODEC.decode(encoded.data).tobytes() == photograph().tobytes()


@unhurried
@given(st.binary(min_size=48, max_size=48), st.integers(0, 2**63 - 1))
def test_pixels_survive_a_round_trip(pixels: bytes, seed: int) -> None:
    image = Image.frombytes("RGB", (4, 4), pixels)
    encoded = CODEC.encode(image, "png", seed=seed)
    assert CODEC.decode(encoded.data).tobytes() == pixels
    assert encoded.seed == seed


@pytest.mark.parametrize(
    ("output_format", "media_type", "extension", "pillow_format"),
    [
        ("png", "image/png", "png", "PNG"),
        ("webp", "image/webp", "webp", "WEBP"),
        ("jpeg", "image/jpeg", "jpg", "JPEG"),
    ],
)
def test_encoded_image_has_its_properties(
    output_format: OutputFormat, media_type: str, extension: str, pillow_format: str
) -> None:
    encoded = CODEC.encode(photograph(), output_format, seed=7)
    assert (encoded.media_type, encoded.extension) == (media_type, extension)
    assert (encoded.width, encoded.height, encoded.seed) == (40, 24, 7)
    assert encoded.sha256 == hashlib.sha256(encoded.data).hexdigest()
    with Image.open(BytesIO(encoded.data)) as written:
        assert (written.format, written.size) == (pillow_format, (40, 24))
    decoded = CODEC.decode(encoded.data)
    assert near(decoded.getpixel((30, 3)), RED, 12)
    assert near(decoded.getpixel((30, 20)), BLUE, 12)


def test_jpeg_keeps_the_edges_of_colours() -> None:
    image = Image.new("RGB", (16, 16), RED)
    image.paste(BLUE, (7, 0, 16, 16))
    decoded = CODEC.decode(CODEC.encode(image, "jpeg", seed=0).data)
    assert near(decoded.getpixel((6, 8)), RED, 25)  # subsampled colours would be off by 60
    assert near(decoded.getpixel((7, 8)), BLUE, 25)


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_equal_pixels_give_equal_bytes_without_metadata(output_format: OutputFormat) -> None:
    marked = photograph()
    profile = b"a colour profile"
    marked.info = {"comment": b"a prompt", "icc_profile": profile, "dpi": (72, 72)}
    marked.getexif()[ExifTags.Base.ImageDescription] = "a prompt"
    plain = CODEC.encode(photograph(), output_format, seed=1)
    encoded = CODEC.encode(marked, output_format, seed=2)
    assert encoded.data == plain.data
    assert b"a prompt" not in encoded.data
    assert marked.info["icc_profile"] == profile  # the caller's image is not changed


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_any_mode_can_be_written(output_format: OutputFormat) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        encoded = CODEC.encode(photograph().convert(mode), output_format, seed=0)
        assert CODEC.decode(encoded.data).mode == "RGB"


# -- provenance -----------------------------------------------------------------------------------

EVERY_FORMAT = pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "provenance.md"
# As long as senders can make them, in characters that need the most room in JSON.
LONGEST = {
    "software": "generation-consumer 10.20.30",
    "request_id": "x" * 64,
    "seed": str(2**32 - 1),
    "model": "m" * 200,
    "revision": "f" * 40,
    "parameters": json.dumps({f"{'a' * 64}{n}": 0.123456789 for n in range(8)}),
    "flagged": "false",
    "prompt": "\U0001f4a1" * 8_000,
    "negative_prompt": "\U0001f4a1" * 8_000,
}


def read_back(data: bytes) -> dict[str, str]:
    with Image.open(BytesIO(data)) as opened:
        if isinstance(opened, PngImagePlugin.PngImageFile):
            texts = {name: str(value) for name, value in opened.text.items()}
            del texts["XML:com.adobe.xmp"]  # the AI mark
            return texts
        written: dict[str, str] = json.loads(opened.getexif()[ExifTags.Base.ImageDescription])
        return written


@EVERY_FORMAT
@pytest.mark.parametrize(
    "value",
    [
        "7",
        "eine Brücke, «à l'aube»",
        "灯台と海 маяк \U0001f4a1",
        'quotes " and \\ and <b>&amp;</b>',
        "two\nlines and a\ttab",
    ],
)
def test_provenance_is_read_back_in_any_script(output_format: OutputFormat, value: str) -> None:
    provenance = {"seed": "7", "prompt": value}
    assert (
        read_back(CODEC.encode(photograph(), output_format, seed=7, provenance=provenance).data)
        == provenance
    )


@EVERY_FORMAT
@unhurried
@given(st.text(max_size=50))
def test_provenance_text_is_stored_without_control_characters(
    output_format: OutputFormat, value: str
) -> None:
    encoded = CODEC.encode(Image.new("RGB", (4, 4)), output_format, seed=0, provenance={"a": value})
    printable = "".join(
        c for c in value if c in "\t\n" or not ("\0" <= c < " " or "\x7f" <= c < "\xa0")
    )
    assert read_back(encoded.data) == {"a": printable}


@EVERY_FORMAT
def test_lone_surrogate_is_not_stored_in_the_provenance(output_format: OutputFormat) -> None:
    provenance = {"prompt": "a\ud800b\x1b[31mc\0d"}
    encoded = CODEC.encode(photograph(), output_format, seed=0, provenance=provenance)
    assert read_back(encoded.data) == {"prompt": "ab[31mcd"}


@EVERY_FORMAT
def test_long_provenance_values_are_truncated(
    output_format: OutputFormat,
) -> None:
    written = read_back(CODEC.encode(photograph(), output_format, seed=0, provenance=LONGEST).data)
    assert written.keys() == LONGEST.keys()
    assert written["prompt"] == "\U0001f4a1" * (MAX_VALUE_LENGTH - 1) + "…"
    assert written["parameters"] == LONGEST["parameters"]


@EVERY_FORMAT
def test_provenance_does_not_change_pixels(output_format: OutputFormat) -> None:
    silent = CODEC.encode(photograph(), output_format, seed=0).data
    saying = CODEC.encode(photograph(), output_format, seed=0, provenance=LONGEST).data
    assert saying != silent
    assert CODEC.decode(saying).tobytes() == CODEC.decode(silent).tobytes()
    assert CODEC.encode(photograph(), output_format, seed=0, provenance=LONGEST).data == saying
    assert CODEC.encode(photograph(), output_format, seed=0, provenance={}).data == silent


@EVERY_FORMAT
def test_existing_metadata_is_not_written_to_the_file(
    output_format: OutputFormat,
) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a secret")
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "a secret"
    exif[ExifTags.Base.Artist] = "somebody"
    for file in (as_file(photograph(), pnginfo=text), as_file(photograph(), "JPEG", exif=exif)):
        with Image.open(BytesIO(file)) as brought:
            brought.load()
            encoded = CODEC.encode(brought, output_format, seed=0, provenance={"seed": "0"})
        assert read_back(encoded.data) == {"seed": "0"}
        assert b"secret" not in encoded.data
        assert b"somebody" not in encoded.data


def test_documented_commands_read_the_provenance(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    files = []
    for output_format in ("png", "webp", "jpeg"):
        provenance = {"request_id": "poster-0001", "prompt": "маяк"}
        encoded = CODEC.encode(photograph(), output_format, seed=0, provenance=provenance)
        files.append(tmp_path / f"image.{encoded.extension}")
        files[-1].write_bytes(encoded.data)
    for file in files:
        output = subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code, str(file)],
            check=True,
            capture_output=True,
            encoding="utf-8",
        ).stdout
        assert output == "request_id: poster-0001\nprompt: маяк\n"


def test_repr_of_an_encoded_image_has_no_bytes() -> None:
    assert "PNG" not in repr(CODEC.encode(photograph(), "png", seed=0))
