"""The image-to-text model: a small Qwen2.5-VL that describes scenes and answers questions on them.

The vision tower is trained alone first, to tell of each part of an image what is there; trained
from the sentences alone it does not learn the shapes.
"""

# mypy: allow-untyped-calls

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from consumer.runners.demonstration.training.autoencoder import encoded
from consumer.runners.demonstration.training.chat import CHAT_TEMPLATE, CONTROL_TOKENS
from consumer.runners.demonstration.training.checkpoint import Checkpoint
from consumer.runners.demonstration.training.pixels import tensors
from consumer.runners.demonstration.training.questions import (
    Question,
    ask_about,
    ask_about_two,
    ask_for_description,
)
from consumer.runners.demonstration.training.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    covered,
    draw,
    some_scene,
)
from consumer.runners.demonstration.training.schedule import (
    ProgressLog,
    Schedule,
    attribute_loss,
    autocast,
    split,
)
from consumer.runners.demonstration.training.words import BYTES, every_word, merges, vocabulary

log = structlog.get_logger()

_TOKEN = 28  # pixels, each side of what is one token
_ACROSS = 4  # tokens, each side of an image
_NEW_TOKENS = 64  # the most that a text has, unless the request says more
_CONTEXT = 4_096  # tokens
_WIDTH = 128
_VISION_WIDTH = 96
_IGNORED = -100  # a label that torch does not count

_SCENES = 12_288
_OF_TWO = 0.4
_BATCH = 64
_LOOK_STEPS = 1_400  # the vision tower alone; at most a third of the steps


def processor() -> Any:
    """The processor: every image becomes about 112x112 pixels, whatever its size."""
    budget = {"shortest_edge": (_ACROSS * _TOKEN) ** 2, "longest_edge": (_ACROSS * _TOKEN) ** 2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=budget),
        tokenizer=_tokenizer(every_word()),
        video_processor=Qwen2VLVideoProcessor(size=budget),
        chat_template=CHAT_TEMPLATE,
    )


def model(tokenizer: Any) -> Any:
    """The model with fresh weights."""
    number = tokenizer.convert_tokens_to_ids
    made = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": _WIDTH,
                "intermediate_size": 320,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": _CONTEXT,
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [4, 6, 6],  # half of a head: 128 / 4 / 2
                },
                "bos_token_id": number("<|endoftext|>"),
                "eos_token_id": number("<|im_end|>"),
                "pad_token_id": number("<|endoftext|>"),
            },
            vision_config={
                "depth": 3,
                "hidden_size": _VISION_WIDTH,
                "intermediate_size": 2 * _VISION_WIDTH,
                "num_heads": 3,
                "out_hidden_size": _WIDTH,
                "fullatt_block_indexes": [0, 1, 2],
            },
            tie_word_embeddings=True,
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
        )
    )
    made.generation_config = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=[number("<|im_end|>"), number("<|endoftext|>")],
        pad_token_id=number("<|endoftext|>"),
    )
    return made


def _tokenizer(said: list[str]) -> Qwen2Tokenizer:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    joined = merges([*said, "system user assistant You are a helpful assistant ."], split)
    return Qwen2Tokenizer(
        vocab=vocabulary(joined, BYTES),
        merges=joined,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(CONTROL_TOKENS),
        model_max_length=_CONTEXT,
    )


@dataclass(frozen=True)
class _Drawn:
    """Scenes and their images, as patches that the vision tower reads."""

    scenes: Sequence[Scene]
    patches: torch.Tensor  # bfloat16, (scenes, patches, values)
    grid: torch.Tensor  # of one image: 1, rows, columns

    @classmethod
    def of(
        cls, scenes: Sequence[Scene], image_processor: Any, choice: random.Random, vae: Any
    ) -> "_Drawn":
        parts = []
        for first in range(0, len(scenes), 256):
            images = tensors([draw(scene, choice) for scene in scenes[first : first + 256]])
            seen = image_processor(
                images=list(_as_generated(vae, images)),
                return_tensors="pt",
                input_data_format="channels_first",
            )
            parts.append(seen.pixel_values.bfloat16().unflatten(0, (len(images), -1)))
        return cls(scenes, torch.cat(parts), seen.image_grid_thw[:1])


@torch.inference_mode()
def _as_generated(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Every second image as the text-to-image model would have decoded it, a little unsharp."""
    latents = encoded(vae, images[::2])
    latents += torch.rand(len(latents), 1, 1, 1) * 0.3 * torch.randn_like(latents) * latents.std()
    with autocast():
        decoded = vae.decode(latents).sample
    images = images.clone()
    images[::2] = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images


def train(vae: Any, steps: int, seed: int, keep: Path | None = None) -> tuple[Any, Any]:
    """A model that describes scenes, and its processor.

    Args:
        vae: What images go through that the text-to-image model makes.
        steps: How often it learns from a batch, with and without the sentences.
        seed: For the weights, the scenes and their order.
        keep: A folder in which a broken training is kept, and gone on with.
    """
    torch.manual_seed(seed)
    choice = random.Random(seed)
    reads = processor()
    learns = model(reads.tokenizer)
    scenes = [some_scene(choice, of_two=_OF_TWO) for _ in range(min(_SCENES, _BATCH * steps))]
    drawn = _Drawn.of(scenes, reads.image_processor, choice, vae)
    log.info("drawn", scenes=len(scenes))
    learns.set_attn_implementation("eager")  # on a CPU, five times as fast on the way back
    look = min(_LOOK_STEPS, steps // 3)
    _learn_to_look(learns.model.visual, drawn, look, choice, keep)
    _learn_to_tell(learns, reads.tokenizer, drawn, steps - look, choice, keep=keep)
    return learns.eval(), reads


def _learn_to_look(
    tower: Any, drawn: _Drawn, steps: int, choice: random.Random, keep: Path | None
) -> None:
    """Train the vision tower to tell of each token which shape, size and colours are there."""
    labels = torch.tensor([covered(scene, _ACROSS) for scene in drawn.scenes])
    heads = torch.nn.ModuleList(
        torch.nn.Linear(_WIDTH, classes)
        for classes in (len(SHAPES) + 1, len(COLOURS) + 1, 4, len(COLOURS))
    )
    inner, others = split([tower])
    schedule = Schedule([*others, *heads.parameters()], matrices=inner, rate=1.5e-3, steps=steps)
    parts = {"tower": tower, "heads": heads, "schedule": schedule}
    checkpoint = Checkpoint(keep and keep / "looking.pt", choice, parts)
    progress = ProgressLog("captions, looking", steps)
    for step in range(checkpoint.resume(), steps):
        batch = torch.randint(len(labels), (_BATCH,))
        with autocast():
            seen = _look(tower, drawn, batch)
            loss = attribute_loss(heads, seen, labels[batch].flatten(0, 1))
        schedule.step(loss)
        progress.add(step, loss)
        checkpoint.keep(step + 1)


def _look(tower: Any, drawn: _Drawn, batch: torch.Tensor) -> torch.Tensor:
    seen = tower(drawn.patches[batch].flatten(0, 1), grid_thw=drawn.grid.repeat(len(batch), 1))
    tokens: torch.Tensor = getattr(seen, "pooler_output", seen)
    return tokens


def _learn_to_tell(
    learns: Any,
    tokenizer: Any,
    drawn: _Drawn,
    steps: int,
    choice: random.Random,
    *,
    keep: Path | None,
) -> None:
    tower = list(learns.model.visual.parameters())
    inner, others = split([learns.model.language_model])
    groups: list[dict[str, object]] = [{"params": tower, "lr": 4e-4}, {"params": others}]
    schedule = Schedule(groups, matrices=inner, rate=1.5e-3, steps=steps)
    parts = {"learns": learns, "schedule": schedule}
    checkpoint = Checkpoint(keep and keep / "telling.pt", choice, parts)
    progress = ProgressLog("captions, telling", steps)
    for step in range(checkpoint.resume(), steps):
        inputs = _inputs(tokenizer, drawn, choice)
        with autocast():
            loss = learns(**inputs, use_cache=False).loss
        schedule.step(loss)
        progress.add(step, loss)
        checkpoint.keep(step + 1)


def _inputs(tokenizer: Any, drawn: _Drawn, choice: random.Random) -> dict[str, torch.Tensor]:
    shown: list[int] = []
    talks: list[tuple[str, str]] = []
    for _ in range(_BATCH):
        chance = choice.random()
        one = choice.randrange(len(drawn.scenes))
        scene = drawn.scenes[one]
        if chance < 0.45:
            images, question = [one], ask_for_description(scene, choice)
        elif chance < 0.75:
            images, question = [one], ask_about(scene, choice)
        else:
            other = choice.randrange(len(drawn.scenes))
            images = [one, other]
            question = ask_about_two([scene, drawn.scenes[other]], choice)
        shown += images
        talks.append(_talk(question, len(images), choice))
    tokens = tokenizer(
        [asked + answer for asked, answer in talks],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids = tokens.input_ids
    labels = ids.masked_fill(tokens.attention_mask == 0, _IGNORED)
    for row, length in zip(labels, _lengths(tokenizer, [asked for asked, _ in talks]), strict=True):
        row[:length] = _IGNORED
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {
        "input_ids": ids,
        "attention_mask": tokens.attention_mask,
        "labels": labels,
        "mm_token_type_ids": (ids == pad).int(),
        "pixel_values": drawn.patches[shown].flatten(0, 1),
        "image_grid_thw": drawn.grid.repeat(len(shown), 1),
    }


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts).input_ids]


def _talk(question: Question, images: int, choice: random.Random) -> tuple[str, str]:
    asked = question.question
    if choice.random() < 0.15:
        asked = asked.rstrip("?.")
    if choice.random() < 0.15:
        asked = asked.lower()
    seen = f"<|vision_start|>{'<|image_pad|>' * _ACROSS**2}<|vision_end|>" * images
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user = f"<|im_start|>user\n{seen}{asked}<|im_end|>\n<|im_start|>assistant\n"
    return system + user, f"{question.answer}<|im_end|>"
