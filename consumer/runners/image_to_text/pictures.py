"""The input pictures of a vision-language model, made to fit its budget of pixels.

Only `PIL.Image` objects come in: qwen-vl-utils and the processors of transformers would also fetch
http addresses and open files, with no limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_utils import process_vision_info

from consumer.ports import UnsupportedParameter

if TYPE_CHECKING:
    from PIL.Image import Image

_MERGED = 2  # patches, each way, that qwen-vl-utils takes for one token
_MAX_RATIO = 200  # longer to shorter side; qwen-vl-utils and transformers refuse more


@dataclass(frozen=True)
class PictureBudget:
    """How large a picture may be.

    Attributes:
        most: Pixels; larger pictures are made smaller.
        least: Pixels; smaller ones are made larger.
        patch: Side of a patch in pixels, where the model cuts pictures of any size into patches as
            Qwen-VL does; None for a model that does its own.
    """

    most: int
    least: int
    patch: int | None

    @classmethod
    def of(cls, image_processor: Any, most: int) -> "PictureBudget":
        """The budget of a model, at most `most` pixels and at most what the model itself wants."""
        patch = getattr(image_processor, "patch_size", None)
        if patch is None or getattr(image_processor, "merge_size", None) != _MERGED:
            return cls(most, 0, None)
        # Qwen-VL's edges are numbers of pixels; those of other families are lengths.
        size = image_processor.size
        own_most = getattr(size, "longest_edge", None) or most
        own_least = getattr(size, "shortest_edge", None) or 0
        return cls(max(min(most, own_most), own_least), own_least, patch)

    def fit(self, images: Sequence["Image"]) -> "list[Image]":
        """The pictures within the budget, in their order.

        Raises:
            UnsupportedParameter: One is too long and narrow for the model.
        """
        if self.patch is None:
            return [self._shrunk(image) for image in images]
        side = self.patch * _MERGED
        # At the budget's edge the shorter side must still be one token wide.
        ratio = min(_MAX_RATIO, self.most / side**2)
        for number, image in enumerate(images):
            if max(image.size) > ratio * min(image.size):
                raise UnsupportedParameter(
                    "images", f"images.{number}: one side is more than {ratio:.0f} times the other"
                )
        content = [
            {"type": "image", "image": image, "max_pixels": self.most, "min_pixels": self.least}
            for image in images
        ]
        fitted, _ = process_vision_info(
            [{"role": "user", "content": content}], image_patch_size=self.patch
        )
        return list(fitted)

    def _shrunk(self, image: "Image") -> "Image":
        pixels = image.width * image.height
        if pixels <= self.most:
            return image
        scale = (self.most / pixels) ** 0.5
        return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
