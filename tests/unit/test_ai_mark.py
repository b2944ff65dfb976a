"""The AI mark of image files, read by programs that do not share code with the encoder."""

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import exiv2
import pytest
from PIL import Image

from consumer.media.codec import ImageCodec
from consumer.ports.media import EncodedImage, OutputFormat

EXIFTOOL = shutil.which("exiftool")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "provenance.md"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SOFTWARE = f"generation-consumer {version('generation-consumer')}"
PROVENANCE = {"seed": "7", "prompt": "маяк"}
IMAGE = Image.new("RGB", (40, 24), (200, 40, 50))

every_format = pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
needs_exiftool = pytest.mark.skipif(
    EXIFTOOL is None and "EXIFTOOL_REQUIRED" not in os.environ,
    reason="exiftool is not on the PATH",
)


def encoded(output_format: OutputFormat, **options: bool) -> EncodedImage:
    return ImageCodec(**options).encode(IMAGE, output_format, seed=7, provenance=PROVENANCE)


def by_exiv2(data: bytes) -> dict[str, str]:
    file: Any = exiv2.ImageFactory.open(data)
    file.readMetadata()
    return {datum.key(): datum.toString() for datum in file.xmpData()}


def by_exiftool(*arguments: str) -> list[dict[str, str]]:
    assert EXIFTOOL is not None, "EXIFTOOL_REQUIRED is set"
    shown = subprocess.run([EXIFTOOL, "-json", *arguments], capture_output=True, check=True).stdout
    found: list[dict[str, str]] = json.loads(shown)
    return found


@every_format
def test_exiv2_reads_the_mark(output_format: OutputFormat) -> None:
    image = encoded(output_format)
    assert image.marks == ("iptc",)
    assert by_exiv2(image.data) == {
        "Xmp.xmp.CreatorTool": SOFTWARE,
        "Xmp.iptcExt.DigitalSourceType": SOURCE_TYPE,
    }


@needs_exiftool
def test_exiftool_reads_the_mark_as_the_page_says(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"^\$ exiftool (-Digital.*) image\.png$", PAGE.read_text(), re.MULTILINE
    )
    files = {}
    for output_format in ("png", "webp", "jpeg"):
        image = encoded(output_format)
        path = tmp_path / f"image.{image.extension}"
        path.write_bytes(image.data)
        files[str(path)] = {"DigitalSourceType": SOURCE_TYPE, "CreatorTool": SOFTWARE}
    found = {one.pop("SourceFile"): one for one in by_exiftool(*command.split(), *files)}
    assert found == files


@every_format
def test_mark_can_be_turned_off(output_format: OutputFormat) -> None:
    image = encoded(output_format, ai_mark=False)
    assert image.marks == ()
    assert by_exiv2(image.data) == {}


@every_format
def test_mark_changes_no_pixel_and_is_the_same_in_each_file(output_format: OutputFormat) -> None:
    marked, unmarked = encoded(output_format), encoded(output_format, ai_mark=False)
    codec = ImageCodec()
    assert codec.decode(marked.data).tobytes() == codec.decode(unmarked.data).tobytes()
    assert encoded(output_format).data == marked.data
