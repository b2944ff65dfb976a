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
    silent_t5,
    t5_tokenizer,
    text_encoder,
)
from consumer.runners.demonstration.training.words import every_word

log = structlog.get_logger()

_WIDTH = 128
_LAYERS = 4
_PATCH = 2
_LARGEST = 128  # pixels, each side of the largest image; it is trained at SIDE only
_T5_TOKENS = 256  # what the pipeline appends to them, always

_SCENES = 20_480
_OF_TWO = 0.4
_PLAIN = 0.1  # of the scenes: by chance alone too few are what the shortest prompts mean
_BATCH = 64
_READING_STEPS = 1_250
_EMPTY = 0.1  # of the prompts: what guidance compares with
_VAGUE = 0.06
_EMA = 0.999


def pipeline(vae: Any) -> Any:
    """The pipeline with fresh weights around an autoencoder."""
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
        text_encoder_3=silent_t5(),
        tokenizer_3=t5_tokenizer(),
    )


def transformer() -> Any:
    """The transformer with fresh weights; each layer leaves what goes through it as it is."""
    made: Any = SD3Transformer2DModel(
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
    for name, parameter in made.named_parameters():
        if name.startswith(("norm_out.linear", "proj_out")) or ".norm1" in name:
            torch.nn.init.zeros_(parameter)
    return made


def train(vae: Any, steps: int, seed: int, keep: Path | None = None) -> Any:
    """A pipeline with this autoencoder that draws scenes.

    Args:
        vae: Trained.
        steps: How often the transformer learns from a batch.
        seed: For the weights, the scenes and their order.
        keep: A folder in which a broken training is kept, and gone on with.
    """
    torch.manual_seed(seed)
    choice = random.Random(seed)
    number = min(_SCENES, _BATCH * steps)
    scenes = [_scene(choice) for _ in range(number)]
    latents = _latents(vae, scenes, choice)
    log.info("drawn", scenes=number, deviation=latents.std().item())
    trained = Trained(pipe := pipeline(vae))
    trained.use_short_attention()
    _learn_to_read(trained, pipe, min(_READING_STEPS, steps), choice, keep)
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
        _follow(average, trained.transformer, min(_EMA, (1 + step) / (10 + step)))
        progress.add(step, loss)
        checkpoint.keep(step + 1)
    trained.transformer = average
    trained.put_into(pipe)
    return pipe


def _latents(vae: Any, scenes: Sequence[Scene], choice: random.Random) -> torch.Tensor:
    """Images of the scenes as the transformer is to make them."""
    parts = [
        encoded(vae, tensors([draw(scene, choice) for scene in scenes[first : first + 512]]))
        for first in range(0, len(scenes), 512)
    ]
    shift, scale = float(vae.config.shift_factor), float(vae.config.scaling_factor)
    return (torch.cat(parts) - shift) * scale


class Trained(torch.nn.Module):
    """The parts of the pipeline that are trained together."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.encoder = pipe.text_encoder
        self.encoder_2 = pipe.text_encoder_2

    def use_short_attention(self) -> None:
        """Compute the same thing as the pipeline, in less time."""
        self.transformer.set_attn_processor(_AttentionWithTail())
        for encoder in (self.encoder, self.encoder_2):
            encoder.set_attn_implementation("eager")

    def loss(self, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """How far the transformer is off the straight way from noise to the latents."""
        noise = torch.randn_like(latents)
        sigma = (0.3 + 1.1 * torch.randn(len(latents))).sigmoid()[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * noise
        with autocast():
            with torch.no_grad():  # what the prompts mean was learned before
                words, pooled = self.read(tokens)
            way = self.transformer(
                hidden_states=noisy,
                timestep=sigma.flatten() * 1000,
                encoder_hidden_states=words,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return functional.mse_loss(way.float(), noise - latents)

    def put_into(self, pipe: Any) -> None:
        """Make these the parts of the pipeline."""
        self.transformer.set_attn_processor(JointAttnProcessor2_0())
        pipe.register_modules(
            transformer=self.transformer.eval(),
            text_encoder=self.encoder.eval(),
            text_encoder_2=self.encoder_2.eval(),
        )

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the transformer gets of a text: its tokens' vectors, and one for all of it."""
        # As the pipeline does: the last layer but one, side by side, then what stands for the T5.
        read = [e(tokens, output_hidden_states=True) for e in (self.encoder, self.encoder_2)]
        words = torch.cat([r.hidden_states[-2] for r in read], dim=-1)
        tail = torch.zeros_like(words[:, :1])
        return torch.cat([words, tail], dim=1), torch.cat([r.text_embeds for r in read], dim=-1)


class _AttentionWithTail:
    """Attention in which the last token of the text counts as often as the pipeline repeats it.

    The pipeline appends 256 tokens that are all the same; one with the logarithm of their number
    added to its score is the same thing, at a quarter of the price.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,  # noqa: ARG002 - always given
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen, read = hidden_states, encoder_hidden_states
        query = _heads(attn, attn.to_q(seen), attn.norm_q, attn.add_q_proj(read), attn.norm_added_q)
        key = _heads(attn, attn.to_k(seen), attn.norm_k, attn.add_k_proj(read), attn.norm_added_k)
        value = _heads(attn, attn.to_v(seen), None, attn.add_v_proj(read), None)
        bias = torch.zeros(key.shape[2], dtype=query.dtype)
        bias[-1] = math.log(_T5_TOKENS)
        # By hand: torch's own takes five times as long on the way back, on a CPU.
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
        mixed = (scores.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        seen, read = mixed[:, : seen.shape[1]], mixed[:, seen.shape[1] :]
        return attn.to_out[0](seen), read if attn.context_pre_only else attn.to_add_out(read)


def _heads(
    attn: Any, seen: torch.Tensor, norm_seen: Any, read: torch.Tensor, norm_read: Any
) -> torch.Tensor:
    """Patches and words side by side, for each head: (batch, heads, tokens, width)."""
    parts = []
    for tokens, norm in ((seen, norm_seen), (read, norm_read)):
        apart = tokens.unflatten(-1, (attn.heads, -1))
        parts.append(apart if norm is None else norm(apart))
    return torch.cat(parts, dim=1).transpose(1, 2)


def _learn_to_read(
    trained: Trained, pipe: Any, steps: int, choice: random.Random, keep: Path | None
) -> None:
    """Train the text encoders to tell what a prompt asks for.

    Trained from the images alone they learn each combination for itself; so, each attribute.
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
        checkpoint.keep(step + 1)


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
    """Numbers of the prompts' pieces: (number, TOKENS)."""
    numbers: torch.Tensor = pipe.tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return numbers


@torch.no_grad()
def _follow(average: torch.nn.Module, trained: torch.nn.Module, slowness: float) -> None:
    for mean, now in zip(average.parameters(), trained.parameters(), strict=True):
        mean.lerp_(now, 1 - slowness)
