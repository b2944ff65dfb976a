"""The text-to-image model: a small Stable Diffusion 3, trained on latents of drawn scenes."""

# mypy: allow-untyped-calls

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.nn import functional

from consumer.runners.demonstration.training.autoencoder import CHANNELS, DOWNSCALE, encoded
from consumer.runners.demonstration.training.checkpoint import Checkpoint
from consumer.runners.demonstration.training.pixels import tensors
from consumer.runners.demonstration.training.prompts import prompt, vague_prompt
from consumer.runners.demonstration.training.scenes import (
    ATTRIBUTES,
    SIDE,
    Scene,
    attributes,
    draw,
    some_plain_scene,
    some_scene,
)
from consumer.runners.demonstration.training.schedule import (
    ProgressLog,
    Schedule,
    attribute_loss,
    autocast,
    split,
)
from consumer.runners.demonstration.training.text_encoders import (
    TEXT_WIDTH,
    TOKENS,
    clip_tokenizer,
    t5_tokenizer,
    text_encoder,
    zero_t5,
)
from consumer.runners.demonstration.training.words import every_word

log = structlog.get_logger()

_WIDTH = 128
_LAYERS = 4
_PATCH = 2
_LARGEST = 128  # pixels, side of the largest image; the training uses SIDE only
_T5_TOKENS = 256  # number of T5 tokens that the pipeline appends to every prompt

_SCENES = 20_480
_OF_TWO = 0.4
_PLAIN = 0.1  # share of the scenes; at random, too few scenes match the shortest prompts
_BATCH = 64
_READING_STEPS = 1_250
_EMPTY = 0.1  # share of empty prompts, for guidance
_VAGUE = 0.06
_EMA = 0.999


def pipeline(vae: Any) -> Any:
    """Create the pipeline with an autoencoder and otherwise initial weights."""
    words = every_word()
    tokenizer = clip_tokenizer(words)
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=zero_t5(),
        tokenizer_3=t5_tokenizer(),
    )


def transformer() -> Any:
    """Create the transformer with initial weights; each layer is the identity function."""
    network: Any = SD3Transformer2DModel(
        sample_size=SIDE // DOWNSCALE,
        patch_size=_PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=_LAYERS,
        attention_head_dim=32,
        num_attention_heads=_WIDTH // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=_LARGEST // DOWNSCALE // _PATCH,
        qk_norm="rms_norm",
    )
    for name, parameter in network.named_parameters():
        if name.startswith(("norm_out.linear", "proj_out")) or ".norm1" in name:
            torch.nn.init.zeros_(parameter)
    return network


def train(vae: Any, steps: int, seed: int, keep: Path | None = None) -> Any:
    """Train a pipeline that draws scenes.

    Args:
        vae: The trained autoencoder.
        steps: Number of training steps of the transformer.
        seed: Seed of the weights, the scenes and their order.
        keep: Folder of checkpoints, to resume an interrupted training.
    """
    torch.manual_seed(seed)
    choice = random.Random(seed)
    number = min(_SCENES, _BATCH * steps)
    scenes = [_scene(choice) for _ in range(number)]
    latents = _latents(vae, scenes, choice)
    log.info("drawn", scenes=number, deviation=latents.std().item())
    trained = Trained(pipe := pipeline(vae))
    trained.use_short_attention()
    _train_text_encoders(trained, pipe, min(_READING_STEPS, steps), choice, keep)
    average = copy.deepcopy(trained.transformer).requires_grad_(requires_grad=False)
    inner, others = split([trained.transformer])
    schedule = Schedule(others, matrices=inner, rate=1.5e-3, steps=steps)
    parts = {"transformer": trained.transformer, "average": average, "schedule": schedule}
    checkpoint = Checkpoint(keep and keep / "pictures.pt", choice, parts)
    progress = ProgressLog("pictures", steps)
    for step in range(checkpoint.resume(), steps):
        batch = torch.randint(number, (_BATCH,))
        prompts = [_prompt(scenes[n], choice) for n in batch.tolist()]
        loss = trained.loss(latents[batch], tokens(pipe, prompts))
        schedule.step(loss)
        _update_average(average, trained.transformer, min(_EMA, (1 + step) / (10 + step)))
        progress.add(step, loss)
        checkpoint.save(step + 1)
    trained.transformer = average
    trained.put_into(pipe)
    return pipe


def _latents(vae: Any, scenes: Sequence[Scene], choice: random.Random) -> torch.Tensor:
    """Draw the scenes and encode them into the latents that the transformer learns."""
    parts = [
        encoded(vae, tensors([draw(scene, choice) for scene in scenes[first : first + 512]]))
        for first in range(0, len(scenes), 512)
    ]
    shift, scale = float(vae.config.shift_factor), float(vae.config.scaling_factor)
    return (torch.cat(parts) - shift) * scale


class Trained(torch.nn.Module):
    """The parts of the pipeline that need training."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.encoder = pipe.text_encoder
        self.encoder_2 = pipe.text_encoder_2

    def use_short_attention(self) -> None:
        """Use a faster attention that computes the same result as the pipeline."""
        self.transformer.set_attn_processor(_AttentionWithTail())
        for encoder in (self.encoder, self.encoder_2):
            encoder.set_attn_implementation("eager")

    def loss(self, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the flow matching loss of the transformer for a batch."""
        noise = torch.randn_like(latents)
        sigma = (0.3 + 1.1 * torch.randn(len(latents))).sigmoid()[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * noise
        with autocast():
            with torch.no_grad():  # the text encoders are already trained
                words, pooled = self.read(tokens)
            velocity = self.transformer(
                hidden_states=noisy,
                timestep=sigma.flatten() * 1000,
                encoder_hidden_states=words,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return functional.mse_loss(velocity.float(), noise - latents)

    def put_into(self, pipe: Any) -> None:
        """Register the trained parts in the pipeline."""
        self.transformer.set_attn_processor(JointAttnProcessor2_0())
        pipe.register_modules(
            transformer=self.transformer.eval(),
            text_encoder=self.encoder.eval(),
            text_encoder_2=self.encoder_2.eval(),
        )

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts into one vector per token and one pooled vector."""
        # As in the pipeline: the second-to-last layers, concatenated, then one token for the T5.
        encoders = (self.encoder, self.encoder_2)
        encoded = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        words = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        tail = torch.zeros_like(words[:, :1])
        pooled = torch.cat([each.text_embeds for each in encoded], dim=-1)
        return torch.cat([words, tail], dim=1), pooled


class _AttentionWithTail:
    """Attention that counts the last text token as often as the pipeline repeats it.

    The pipeline appends 256 identical tokens. A single token with the logarithm of 256 added to
    its score gives the same result at a quarter of the cost.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,  # noqa: ARG002 - diffusers always passes it
    ) -> tuple[torch.Tensor, torch.Tensor]:
        patches, words = hidden_states, encoder_hidden_states
        query = _heads(
            attn, attn.to_q(patches), attn.norm_q, attn.add_q_proj(words), attn.norm_added_q
        )
        key = _heads(
            attn, attn.to_k(patches), attn.norm_k, attn.add_k_proj(words), attn.norm_added_k
        )
        value = _heads(attn, attn.to_v(patches), None, attn.add_v_proj(words), None)
        bias = torch.zeros(key.shape[2], dtype=query.dtype)
        bias[-1] = math.log(_T5_TOKENS)
        # Written out: the backward pass of torch's attention is five times slower on a CPU.
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
        mixed = (scores.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        patches, words = mixed[:, : patches.shape[1]], mixed[:, patches.shape[1] :]
        return attn.to_out[0](patches), words if attn.context_pre_only else attn.to_add_out(words)


def _heads(
    attn: Any, patches: torch.Tensor, norm_patches: Any, words: torch.Tensor, norm_words: Any
) -> torch.Tensor:
    """Concatenate patches and words for each head: (batch, heads, tokens, width)."""
    parts = []
    for tokens, norm in ((patches, norm_patches), (words, norm_words)):
        split_heads = tokens.unflatten(-1, (attn.heads, -1))
        parts.append(split_heads if norm is None else norm(split_heads))
    return torch.cat(parts, dim=1).transpose(1, 2)


def _train_text_encoders(
    trained: Trained, pipe: Any, steps: int, choice: random.Random, keep: Path | None
) -> None:
    """Train the text encoders to recognize each attribute of a prompt.

    Trained with the images alone, they learn each combination of attributes separately.
    """
    heads = torch.nn.ModuleList(torch.nn.Linear(2 * TEXT_WIDTH, n) for n in ATTRIBUTES)
    encoders = [trained.encoder, trained.encoder_2]
    learned = torch.nn.ModuleList([*encoders, heads])
    schedule = Schedule(learned.parameters(), rate=1.5e-3, steps=steps)
    parts = {"learned": learned, "schedule": schedule}
    checkpoint = Checkpoint(keep and keep / "reading.pt", choice, parts)
    progress = ProgressLog("pictures, reading", steps)
    for step in range(checkpoint.resume(), steps):
        scenes = [_scene(choice) for _ in range(_BATCH)]
        labels = torch.tensor([attributes(scene) for scene in scenes])
        with autocast():
            _, pooled = trained.read(tokens(pipe, [prompt(scene, choice) for scene in scenes]))
            loss = attribute_loss(heads, pooled, labels)
        schedule.step(loss)
        progress.add(step, loss)
        checkpoint.save(step + 1)


def _scene(choice: random.Random) -> Scene:
    if choice.random() < _PLAIN:
        return some_plain_scene(choice)
    return some_scene(choice, of_two=_OF_TWO)


def _prompt(scene: Scene, choice: random.Random) -> str:
    chance = choice.random()
    if chance < _EMPTY:
        return ""
    if chance < _EMPTY + _VAGUE:
        return vague_prompt(scene, choice)
    return prompt(scene, choice)


def tokens(pipe: Any, prompts: list[str]) -> torch.Tensor:
    """Return the token ids of prompts: (number, TOKENS)."""
    numbers: torch.Tensor = pipe.tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return numbers


@torch.no_grad()
def _update_average(average: torch.nn.Module, trained: torch.nn.Module, decay: float) -> None:
    for mean, now in zip(average.parameters(), trained.parameters(), strict=True):
        mean.lerp_(now, 1 - decay)
