"""The pixel budget of a vision-language model, and resizing of input images to it.

Only `PIL.Image` objects are passed on: qwen-vl-utils and the processors of transformers would also
download URLs and open files, without limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_utils.vision_process import MAX_RATIO, smart_resize

from consumer.ports.model import UnsupportedParameter

if TYPE_CHECKING:
    from PIL.Image import Image

_MERGED = 2  # patches in each direction that are merged into one token


@dataclass(frozen=True)
class ImageBudget:
    """The limits for the size of an image.

    Attributes:
        most: In pixels; larger images are scaled down.
        least: In pixels; smaller images are scaled up.
        patch: Side of a patch in pixels for models that split images of any size into patches, as
            Qwen-VL does; None for other models.
    """

    most: int
    least: int
    patch: int | None

    @classmethod
    def of(cls, image_processor: Any, most: int) -> "ImageBudget":
        """Return the budget of a model: at most `most` pixels, within the model's own limits."""
        patch = getattr(image_processor, "patch_size", None)
        if patch is None or getattr(image_processor, "merge_size", None) != _MERGED:
            return cls(most, 0, None)
        # The edges of Qwen-VL are numbers of pixels; in other families they are lengths. Old files
        # have other names for them.
        size = image_processor.size
        own_most = _edge(size, "longest_edge", "max_pixels") or most
        own_least = _edge(size, "shortest_edge", "min_pixels") or 0
        return cls(max(min(most, own_most), own_least), own_least, patch)

    @property
    def is_exact(self) -> bool:
        """Whether the images from `fit` need no resizing by the image processor."""
        return self.patch is not None

    def fit(self, images: Sequence["Image"]) -> "list[Image]":
        """Resize images to the budget; the order stays.

        Raises:
            UnsupportedParameter: An image is too long and narrow. Some processors would scale its
                shorter side to some hundred pixels and the longer side in proportion.
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
        """Resize an image so that its sides are multiples of `side`, a token's side in pixels.

        Rounding can make the ratio of the sides exceed `MAX_RATIO`. The image processor must not
        resize the image again, because it would refuse such an image.
        """
        height, width = smart_resize(
            image.height, image.width, factor=side, min_pixels=self.least, max_pixels=self.most
        )
        # Rounding up to `least` can exceed `most`.
        if (excess := height * width / self.most) > 1:
            height, width = (int(edge / excess**0.5) // side * side for edge in (height, width))
        # Rounding down can make the shorter side 0, and raising it then exceeds `most`.
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
