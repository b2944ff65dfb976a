"""The training of the demonstration models matches the runners that load them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.models import Bench


def test_the_short_attention_of_the_training_gives_the_numbers_of_the_pipeline() -> None:
    """Training replaces the 256 tokens that the pipeline appends with one token."""
    torch = importlib.import_module("torch")
    images = importlib.import_module("consumer.runners.demonstration.training.images")
    autoencoder = importlib.import_module("consumer.runners.demonstration.training.autoencoder")
    torch.manual_seed(0)
    pipe = images.pipeline(autoencoder.autoencoder())
    for parameter in pipe.transformer.parameters():
        if not parameter.any():  # zero weights would hide every difference
            torch.nn.init.normal_(parameter, std=0.05)
    trained = images.Trained(pipe)
    prompts = ["a small red star on a white background at the top", ""]
    noisy, times = torch.randn(2, 8, 16, 16), torch.tensor([300.0, 700.0])
    with torch.inference_mode():
        words, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False
        )
        long = _forward(pipe.transformer, noisy, times, words, pooled)
        trained.use_short_attention()
        words, pooled = trained.read(images.tokens(pipe, prompts))
        short = _forward(pipe.transformer, noisy, times, words, pooled)
    assert long.abs().mean() > 0.1
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)


def _forward(transformer, noisy, times, words, pooled):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return transformer(
        hidden_states=noisy,
        timestep=times,
        encoder_hidden_states=words,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def test_the_autoencoder_is_trained_with_changed_colours() -> None:
    """Half of the images keep their colours; the others get colours of the same range."""
    torch = importlib.import_module("torch")
    autoencoder = importlib.import_module("consumer.runners.demonstration.training.autoencoder")
    torch.manual_seed(0)
    images = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(64, 3, 8, 8)
    tinted = autoencoder._tinted(images)
    changed = (tinted != images).flatten(1).any(dim=1)
    assert 16 < changed.sum() < 48
    assert tinted.abs().max() <= 1
    assert (tinted == tinted[:, :, :1, :1]).all()
    assert len(tinted[changed][:, :, 0, 0].unique(dim=0)) == changed.sum()


@pytest.mark.timeout(320)
def test_the_training_saves_both_models_where_the_runners_load_them(tmp_path: Path) -> None:
    """Run the command of the model card with one or two steps for each part."""
    command = [sys.executable, "-m", "consumer.runners.demonstration.training"]
    done = subprocess.run(
        [*command, "--share", "0.0002", "--to", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # its tensors are too small for several threads
        capture_output=True,
        text=True,
        timeout=300,  # seconds; it takes 40 seconds on slow cores
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert not any(str(tmp_path) in file.read_text() for file in tmp_path.rglob("*.json"))
    loaded = Bench(tmp_path)
    image = loaded.image("a red circle", 1)
    assert image.size == (64, 64)
    assert isinstance(loaded.text([image], "What is this?"), str)
    loaded.close()
