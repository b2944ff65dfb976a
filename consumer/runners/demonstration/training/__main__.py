"""Train the demonstration models: `python -m consumer.runners.demonstration.training`.

Everything is made here: the images are drawn and the sentences put together by this package. The
weights are written as the runners load them, in half precision.
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
from generation_contracts import Task

log = structlog.get_logger()

HERE = Path(__file__).parent
SEED = 1
STEPS = {"autoencoder": 5_400, "pictures": 11_000, "captions": 5_200}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(STEPS)))
@click.option(
    "--to", type=click.Path(path_type=Path), default=HERE.parent, help="default: in the package"
)
@click.option("--keep", type=click.Path(path_type=Path), help="a folder, to go on after a break")
@click.option("--seed", default=SEED, show_default=True)
@click.option("--share", default=1.0, show_default=True, help="of the steps, to try it out")
def main(parts: tuple[str, ...], to: Path, keep: Path | None, seed: int, share: float) -> None:
    """Train PARTS, or all of them in their order; a part takes those before it from the folder."""
    began = time.monotonic()
    parts = parts or tuple(STEPS)
    steps = {part: max(1, round(share * number)) for part, number in STEPS.items()}
    drawing, telling = (to / str(task) for task in Task)
    if "autoencoder" in parts:
        _save(autoencoder.train(steps["autoencoder"], seed), drawing / "vae")
    # Loaded for each: it is in the pipeline, and what is saved is made half as precise.
    if "pictures" in parts:
        vae = _autoencoder(drawing / "vae")
        _save(images.train(vae, steps["pictures"], seed, keep), drawing)
    if "captions" in parts:
        vae = _autoencoder(drawing / "vae")
        model, processor = captions.train(vae, steps["captions"], seed, keep)
        _save(model, telling)
        processor.save_pretrained(telling)
    log.info("trained", parts=parts, minutes=round((time.monotonic() - began) / 60, 1))


def _autoencoder(folder: Path) -> Any:
    vae: Any = AutoencoderKL.from_pretrained(folder).eval()
    vae.register_to_config(_name_or_path="")  # else it is saved with the name of this folder
    return vae


def _save(model: Any, folder: Path) -> None:
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
