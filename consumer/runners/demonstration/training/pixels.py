"""Images as tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


def tensors(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size, RGB, as uint8 of (number, 3, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2)
