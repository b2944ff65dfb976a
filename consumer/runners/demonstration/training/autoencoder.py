"""The autoencoder between images of 64x64 pixels and latents of 16x16.

The training adds noise to the latents. The decoder learns to decode inexact latents into clean
shapes, because the latents from the transformer are never exact.
"""

# mypy: allow-untyped-calls

import random
from typing import Any

import structlog
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from consumer.runners.demonstration.training.pixels import tensors
from consumer.runners.demonstration.training.scenes import SIDE, draw, some_scene
from consumer.runners.demonstration.training.schedule import ProgressLog, Schedule, autocast

log = structlog.get_logger()

DOWNSCALE = 4
CHANNELS = 8  # of the latents
_WIDTHS = (16, 48, 64)
_IMAGES = 16_384  # drawn once, and flipped at random
_BATCH = 16
_OF_TWO = 0.5  # share of the images with two things
_NOISE = 0.3  # maximum noise, in standard deviations of the latents
_KL = 1e-5
_TINT = 0.3  # maximum by which the range of a channel shrinks


def autoencoder() -> Any:
    """Create the autoencoder with initial weights."""
    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=_WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * len(_WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(_WIDTHS),
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train(steps: int, seed: int) -> Any:
    """Train an autoencoder whose latents have a mean of 0 and a standard deviation of 1."""
    torch.manual_seed(seed)
    choice = random.Random(seed)
    number = min(_IMAGES, _BATCH * steps)
    images = tensors([draw(some_scene(choice, of_two=_OF_TWO), choice) for _ in range(number)])
    model = autoencoder()
    schedule = Schedule(model.parameters(), rate=2e-3, steps=steps)
    progress = ProgressLog("autoencoder", steps)
    for step in range(steps):
        batch = _batch(images, choice)
        with autocast():
            latents = model.encode(batch).latent_dist
            sample = latents.sample()
            noise = torch.rand(len(batch), 1, 1, 1) * _NOISE * sample.detach().std()
            decoded = model.decode(sample + noise * torch.randn_like(sample)).sample
        loss = _distance(decoded.float(), batch) + _KL * latents.kl().mean() / SIDE
        schedule.step(loss)
        progress.add(step, loss)
    _normalize(model.eval(), images[:2048])
    _sharpen(model, images, steps, seed)
    return model


def _sharpen(model: Any, images: torch.Tensor, steps: int, seed: int) -> None:
    """Train the decoder alone, with fixed latents.

    The joint training of encoder and decoder leaves soft edges with ringing.

    Args:
        model: The autoencoder, with latents of a standard deviation of 1.
        images: uint8, (number, 3, SIDE, SIDE).
        steps: Number of training steps.
        seed: Seed of the noise and of the order of the images.
    """
    torch.manual_seed(seed)
    choice = random.Random(seed)
    schedule = Schedule(model.decoder.parameters(), rate=1e-3, steps=steps)
    progress = ProgressLog("autoencoder, sharp", steps)
    for step in range(steps):
        batch = _batch(images, choice)
        with autocast():
            with torch.no_grad():
                latents = model.encode(batch).latent_dist.mean
            noise = torch.rand(len(batch), 1, 1, 1) * _NOISE
            decoded = model.decode(latents + noise * torch.randn_like(latents)).sample
        loss = _distance(decoded.float(), batch)
        schedule.step(loss)
        progress.add(step, loss)


def _batch(images: torch.Tensor, choice: random.Random) -> torch.Tensor:
    batch = images[torch.randint(len(images), (_BATCH,))].float() / 127.5 - 1
    if choice.random() < 0.5:
        batch = batch.flip(3)
    return _tinted(batch)


def _tinted(images: torch.Tensor) -> torch.Tensor:
    """Shift the colours of half of the images slightly, each channel independently.

    Trained with ten colours alone, the model memorizes combinations of colours. It then decodes
    a new combination with a similar colour, for example red on gray as orange.
    """
    number = len(images)
    gain = 1 - _TINT * torch.rand(number, 3, 1, 1)
    shift = (1 - gain) * (2 * torch.rand(number, 3, 1, 1) - 1)  # stays within -1..1
    as_drawn = torch.rand(number, 1, 1, 1) < 0.5
    return torch.where(as_drawn, images, images * gain + shift)


def _distance(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # Edges are few pixels but define the shape, so the loss counts their differences again.
    across = functional.l1_loss(decoded.diff(dim=3), target.diff(dim=3))
    down = functional.l1_loss(decoded.diff(dim=2), target.diff(dim=2))
    return (
        functional.l1_loss(decoded, target) + functional.mse_loss(decoded, target) + across + down
    )


@torch.inference_mode()
def _normalize(model: Any, images: torch.Tensor) -> None:
    """Scale each channel of the latents with the weights, and store the offset in the config.

    The transformer learns latents of equal deviations best, and the pipeline has a single factor.
    """
    latents = encoded(model, images)
    deviations = latents.std(dim=(0, 2, 3))
    means = model.encoder.conv_out.weight[:CHANNELS]
    means /= deviations[:, None, None, None]
    model.encoder.conv_out.bias[:CHANNELS] /= deviations
    model.decoder.conv_in.weight *= deviations[None, :, None, None]
    scaled = latents / deviations[None, :, None, None]
    model.register_to_config(
        scaling_factor=1 / scaled.std().item(), shift_factor=scaled.mean().item()
    )
    log.info("latents", deviation=scaled.std().item(), mean=scaled.mean().item())


@torch.inference_mode()
def encoded(model: Any, images: torch.Tensor, *, batch: int = 64) -> torch.Tensor:
    """Encode images into unscaled latents, float32, (number, CHANNELS, 16, 16).

    Args:
        model: The autoencoder.
        images: uint8, (number, 3, SIDE, SIDE).
        batch: Number of images in one pass.
    """
    parts = []
    for part in images.split(batch):
        with autocast():
            moments = model.encode(part.float() / 127.5 - 1).latent_dist
        parts.append(moments.mean.float())
    return torch.cat(parts)
