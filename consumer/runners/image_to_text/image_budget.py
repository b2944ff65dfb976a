"""The input images of a vision-language model, made to fit its budget of pixels.

Only `PIL.Image` objects come in: qwen-vl-utils and the processors of transformers would also fetch
http addresses and open files, with no limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_utils.vision_process import MAX_RATIO, smart_resize

from consumer.ports.model import UnsupportedParameter

if TYPE_CHECKING:
    from PIL.Image import Image

_MERGED = 2  # patches, each way, that are one token


@dataclass(frozen=True)
class ImageBudget:
    """How large an image may be.

    Attributes:
        most: Pixels; larger images are made smaller.
        least: Pixels; smaller ones are made larger.
        patch: Side of a patch in pixels, where the model cuts images of any size into patches as
            Qwen-VL does; None for a model that does its own.
    """

    most: int
    least: int
    patch: int | None

    @classmethod
    def of(cls, image_processor: Any, most: int) -> "ImageBudget":
        """The budget of a model, at most `most` pixels and at most what the model itself wants."""
        patch = getattr(image_processor, "patch_size", None)
        if patch is None or getattr(image_processor, "merge_size", None) != _MERGED:
            return cls(most, 0, None)
        # Qwen-VL's edges are numbers of pixels; those of other families are lengths. Old files name
        # them otherwise.
        size = image_processor.size
        own_most = _edge(size, "longest_edge", "max_pixels") or most
        own_least = _edge(size, "shortest_edge", "min_pixels") or 0
        return cls(max(min(most, own_most), own_least), own_least, patch)

    @property
    def is_exact(self) -> bool:
        """Whether the images that `fit` gives need no resizing by the image processor."""
        return self.patch is not None

    def fit(self, images: Sequence["Image"]) -> "list[Image]":
        """The images within the budget, in their order.

        Raises:
            UnsupportedParameter: One is too long and narrow: some processors make the shorter side
                some hundred pixels long, and the longer one in proportion.
        """
        for number, image in enumerate(images):
            if max(image.size) > MAX_RATIO * min(image.size):
                raise UnsupportedParameter(
                    "images", f"images.{number}: one side is more than {MAX_RATIO} times the other"
                )
        if self.patch is None:
            return [self._shrunk(image) for image in images]
        return [self._resized(image, self.patch * _MERGED) for image in images]

    def _resized(self, image: "Image", side: int) -> "Image":
        """An image whose sides are multiples of `side`, the pixels of a token's side.

        The sides are rounded, so that they may be more than `MAX_RATIO` times each other: the image
        processor must not resize the image again, because it would refuse it.
        """
        height, width = smart_resize(
            image.height, image.width, factor=side, min_pixels=self.least, max_pixels=self.most
        )
        # Rounding up to the least pixels can exceed the most.
        if (excess := height * width / self.most) > 1:
            height, width = (int(edge / excess**0.5) // side * side for edge in (height, width))
        # Rounding down can leave nothing of the shorter side, and then too much of the longer one.
        longest = max(self.most // side**2, 1) * side
        height, width = (min(max(edge, side), longest) for edge in (height, width))
        return image.resize((width, height))

    def _shrunk(self, image: "Image") -> "Image":
        pixels = image.width * image.height
        if pixels <= self.most:
            return image
        scale = (self.most / pixels) ** 0.5
        return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _edge(size: Any, *names: str) -> int | None:
    return next((edge for name in names if (edge := getattr(size, name, None))), None)
