"""Train the demonstration models: `python -m consumer.runners.demonstration.training`.

This package generates all training data: it draws the images and composes the sentences. It saves
the weights in half precision, in the layout that the runners load.
"""

# mypy: allow-untyped-calls

import time
from pathlib import Path
from typing import Any

import click
import structlog
import torch
from diffusers import AutoencoderKL

from consumer.runners.demonstration.training import autoencoder, captions, images
from generation_contracts.base import DEFAULT_QUEUES

log = structlog.get_logger()

HERE = Path(__file__).parent
SEED = 1
STEPS = {"autoencoder": 5_400, "pictures": 11_000, "captions": 5_200}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(STEPS)))
@click.option(
    "--to", type=click.Path(path_type=Path), default=HERE.parent, help="default: in the package"
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="folder of checkpoints, to resume an interrupted training",
)
@click.option("--seed", default=SEED, show_default=True)
@click.option(
    "--share", default=1.0, show_default=True, help="share of the steps, for a short trial"
)
def main(parts: tuple[str, ...], to: Path, keep: Path | None, seed: int, share: float) -> None:
    """Train PARTS, or all of them. A part loads the results of earlier parts from the folder."""
    began = time.monotonic()
    parts = parts or tuple(STEPS)
    steps = {part: max(1, round(share * number)) for part, number in STEPS.items()}
    image_folder, text_folder = (to / str(task) for task in DEFAULT_QUEUES)
    if "autoencoder" in parts:
        _save(autoencoder.train(steps["autoencoder"], seed), image_folder / "vae")
    # Each part loads its own copy, because `_save` converts the weights to half precision.
    if "pictures" in parts:
        vae = _autoencoder(image_folder / "vae")
        _save(images.train(vae, steps["pictures"], seed, keep), image_folder)
    if "captions" in parts:
        vae = _autoencoder(image_folder / "vae")
        model, processor = captions.train(vae, steps["captions"], seed, keep)
        _save(model, text_folder)
        processor.save_pretrained(text_folder)
    log.info("trained", parts=parts, minutes=round((time.monotonic() - began) / 60, 1))


def _autoencoder(folder: Path) -> Any:
    vae: Any = AutoencoderKL.from_pretrained(folder).eval()
    vae.register_to_config(_name_or_path="")  # otherwise the saved config contains this path
    return vae


def _save(model: Any, folder: Path) -> None:
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
