"""Images as tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


def tensors(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return RGB images of one size as a tensor, uint8, (number, 3, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2)
