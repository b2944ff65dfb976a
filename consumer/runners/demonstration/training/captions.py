"""The image-to-text model: a small Qwen2.5-VL that describes scenes and answers questions on them.

The vision tower first trains alone: it learns to recognize the content of each part of an image.
Trained with the sentences alone, it does not learn the shapes.
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

_TOKEN = 28  # pixels, side of the square that is one token
_ACROSS = 4  # tokens, side of an image
_NEW_TOKENS = 64  # default limit of a text
_CONTEXT = 4_096  # tokens
_WIDTH = 128
_VISION_WIDTH = 96
_IGNORED = -100  # label that torch leaves out of the loss

_SCENES = 12_288
_OF_TWO = 0.4
_BATCH = 64
_TOWER_STEPS = 1_400  # for the vision tower alone; at most a third of the steps


def processor() -> Any:
    """Create the processor. It resizes every image to about 112x112 pixels."""
    budget = {"shortest_edge": (_ACROSS * _TOKEN) ** 2, "longest_edge": (_ACROSS * _TOKEN) ** 2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=budget),
        tokenizer=_tokenizer(every_word()),
        video_processor=Qwen2VLVideoProcessor(size=budget),
        chat_template=CHAT_TEMPLATE,
    )


def model(tokenizer: Any) -> Any:
    """Create the model with initial weights."""
    number = tokenizer.convert_tokens_to_ids
    network = Qwen2_5_VLForConditionalGeneration(
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
    network.generation_config = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=[number("<|im_end|>"), number("<|endoftext|>")],
        pad_token_id=number("<|endoftext|>"),
    )
    return network


def _tokenizer(texts: list[str]) -> Qwen2Tokenizer:
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
    joined = merges([*texts, "system user assistant You are a helpful assistant ."], split)
    return Qwen2Tokenizer(
        vocab=vocabulary(joined, BYTES),
        merges=joined,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(CONTROL_TOKENS),
        model_max_length=_CONTEXT,
    )


@dataclass(frozen=True)
class _TrainingImages:
    """Scenes and their images, as the patches that are the input of the vision tower."""

    scenes: Sequence[Scene]
    patches: torch.Tensor  # bfloat16, (scenes, patches, values)
    grid: torch.Tensor  # grid of one image: 1, rows, columns

    @classmethod
    def of(
        cls, scenes: Sequence[Scene], image_processor: Any, choice: random.Random, vae: Any
    ) -> "_TrainingImages":
        parts = []
        for first in range(0, len(scenes), 256):
            images = tensors([draw(scene, choice) for scene in scenes[first : first + 256]])
            features = image_processor(
                images=list(_as_generated(vae, images)),
                return_tensors="pt",
                input_data_format="channels_first",
            )
            parts.append(features.pixel_values.bfloat16().unflatten(0, (len(images), -1)))
        return cls(scenes, torch.cat(parts), features.image_grid_thw[:1])


@torch.inference_mode()
def _as_generated(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Replace every second image with a slightly blurred one, as the autoencoder decodes it."""
    latents = encoded(vae, images[::2])
    latents += torch.rand(len(latents), 1, 1, 1) * 0.3 * torch.randn_like(latents) * latents.std()
    with autocast():
        decoded = vae.decode(latents).sample
    images = images.clone()
    images[::2] = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images


def train(vae: Any, steps: int, seed: int, keep: Path | None = None) -> tuple[Any, Any]:
    """Train a model that describes scenes; return it with its processor.

    Args:
        vae: The autoencoder of the text-to-image model.
        steps: Number of training steps, including those of the vision tower alone.
        seed: Seed of the weights, the scenes and their order.
        keep: Folder of checkpoints, to resume an interrupted training.
    """
    torch.manual_seed(seed)
    choice = random.Random(seed)
    reader = processor()
    network = model(reader.tokenizer)
    scenes = [some_scene(choice, of_two=_OF_TWO) for _ in range(min(_SCENES, _BATCH * steps))]
    data = _TrainingImages.of(scenes, reader.image_processor, choice, vae)
    log.info("drawn", scenes=len(scenes))
    network.set_attn_implementation("eager")  # its backward pass is five times as fast on a CPU
    tower_steps = min(_TOWER_STEPS, steps // 3)
    _train_vision_tower(network.model.visual, data, tower_steps, choice, keep)
    _train_captioner(network, reader.tokenizer, data, steps - tower_steps, choice, keep=keep)
    return network.eval(), reader


def _train_vision_tower(
    tower: Any, data: _TrainingImages, steps: int, choice: random.Random, keep: Path | None
) -> None:
    """Train the vision tower to recognize the shape, size and colours at each token."""
    labels = torch.tensor([covered(scene, _ACROSS) for scene in data.scenes])
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
            features = _vision_features(tower, data, batch)
            loss = attribute_loss(heads, features, labels[batch].flatten(0, 1))
        schedule.step(loss)
        progress.add(step, loss)
        checkpoint.save(step + 1)


def _vision_features(tower: Any, data: _TrainingImages, batch: torch.Tensor) -> torch.Tensor:
    features = tower(data.patches[batch].flatten(0, 1), grid_thw=data.grid.repeat(len(batch), 1))
    tokens: torch.Tensor = getattr(features, "pooler_output", features)
    return tokens


def _train_captioner(
    network: Any,
    tokenizer: Any,
    data: _TrainingImages,
    steps: int,
    choice: random.Random,
    *,
    keep: Path | None,
) -> None:
    tower = list(network.model.visual.parameters())
    inner, others = split([network.model.language_model])
    groups: list[dict[str, object]] = [{"params": tower, "lr": 4e-4}, {"params": others}]
    schedule = Schedule(groups, matrices=inner, rate=1.5e-3, steps=steps)
    parts = {"learns": network, "schedule": schedule}
    checkpoint = Checkpoint(keep and keep / "telling.pt", choice, parts)
    progress = ProgressLog("captions, telling", steps)
    for step in range(checkpoint.resume(), steps):
        inputs = _inputs(tokenizer, data, choice)
        with autocast():
            loss = network(**inputs, use_cache=False).loss
        schedule.step(loss)
        progress.add(step, loss)
        checkpoint.save(step + 1)


def _inputs(
    tokenizer: Any, data: _TrainingImages, choice: random.Random
) -> dict[str, torch.Tensor]:
    shown: list[int] = []
    chats: list[tuple[str, str]] = []
    for _ in range(_BATCH):
        chance = choice.random()
        one = choice.randrange(len(data.scenes))
        scene = data.scenes[one]
        if chance < 0.45:
            images, question = [one], ask_for_description(scene, choice)
        elif chance < 0.75:
            images, question = [one], ask_about(scene, choice)
        else:
            other = choice.randrange(len(data.scenes))
            images = [one, other]
            question = ask_about_two([scene, data.scenes[other]], choice)
        shown += images
        chats.append(_chat(question, len(images), choice))
    tokens = tokenizer(
        [prompt + answer for prompt, answer in chats],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids = tokens.input_ids
    labels = ids.masked_fill(tokens.attention_mask == 0, _IGNORED)
    for row, length in zip(
        labels, _lengths(tokenizer, [prompt for prompt, _ in chats]), strict=True
    ):
        row[:length] = _IGNORED
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {
        "input_ids": ids,
        "attention_mask": tokens.attention_mask,
        "labels": labels,
        "mm_token_type_ids": (ids == pad).int(),
        "pixel_values": data.patches[shown].flatten(0, 1),
        "image_grid_thw": data.grid.repeat(len(shown), 1),
    }


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts).input_ids]


def _chat(question: Question, images: int, choice: random.Random) -> tuple[str, str]:
    text = question.question
    if choice.random() < 0.15:
        text = text.rstrip("?.")
    if choice.random() < 0.15:
        text = text.lower()
    image_tokens = f"<|vision_start|>{'<|image_pad|>' * _ACROSS**2}<|vision_end|>" * images
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user = f"<|im_start|>user\n{image_tokens}{text}<|im_end|>\n<|im_start|>assistant\n"
    return system + user, f"{question.answer}<|im_end|>"
