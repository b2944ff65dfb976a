"""Measures when memory is short: their order, their reports, and their removal after the run."""

# mypy: allow-untyped-calls

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consumer.ports.model import OutOfMemory, RunnerOutput
from consumer.runners import ModelRunner
from consumer.runners.text_to_image.memory_guard import free_bytes, min_decode_bytes
from generation_contracts import TextToImageRequest
from tests.support.model_runs import run_model
from tests.support.tiny_adapters import pipeline, save_adapter
from tests.support.tiny_models import Folder, Load

CPU = torch.device("cpu")
ONE_AT_A_TIME, IN_TILES, MOVED = (
    "made one image at a time",
    "decoded in tiles",
    "kept only the active part on the device",
)

Shared = Callable[..., ModelRunner]


def generate(runner: ModelRunner, *, save_memory: bool = False, **fields: Any) -> RunnerOutput:
    small = {"prompt": "a cat", "width": 32, "height": 32, "num_inference_steps": 2, "seed": 7}
    return run_model(
        runner,
        TextToImageRequest(**{**small, **fields}),
        [],
        save_memory=save_memory,
    )


def pixels(output: RunnerOutput) -> list[bytes]:
    return [image.image.tobytes() for image in output.images]


def make_movable(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU stand for an accelerator: the same hooks move the parts."""
    monkeypatch.setattr(runner._model, "_movable", True)


def set_free_bytes(runner: ModelRunner, free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner._model, "_free_bytes", lambda _: free)


class FullDevice:
    """Fails the decoder with an out-of-memory error, and records the tensors of the run."""

    def __init__(self, pipe: Any) -> None:
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.switches: list[tuple[bool, bool]] = []
        self._vae = pipe.vae
        self._hook = pipe.vae.decoder.register_forward_pre_hook(self._fail)

    def _fail(self, _: torch.nn.Module, latents: tuple[torch.Tensor, ...]) -> None:
        own = torch.zeros(1000)
        self.tensors += [weakref.ref(own), *map(weakref.ref, latents)]
        self.switches.append((self._vae.use_slicing, self._vae.use_tiling))
        raise torch.OutOfMemoryError("no more")

    def remove(self) -> None:
        self._hook.remove()


@pytest.fixture
def sd3(shared_runner: Shared) -> ModelRunner:
    return shared_runner("stable_diffusion_3")


# -- measures and their reports -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_memory", "movable", "images", "tried"),
    [
        (False, True, 2, ()),
        (True, False, 2, (ONE_AT_A_TIME, IN_TILES)),
        (True, False, 1, (IN_TILES,)),
        (True, True, 1, (IN_TILES, MOVED)),
    ],
)
def test_an_out_of_memory_error_lists_the_measures(
    *,
    save_memory: bool,
    movable: bool,
    images: int,
    tried: tuple[str, ...],
    sd3: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if movable:
        make_movable(sd3, monkeypatch)
    full = FullDevice(pipeline(sd3))
    with pytest.raises(OutOfMemory) as failed:
        generate(sd3, save_memory=save_memory, num_images=images)
    full.remove()
    assert failed.value.tried == tried
    assert full.switches == [(save_memory, save_memory)]


def test_a_configured_measure_is_not_listed_and_stays_on(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = pipeline(sd3).vae
    monkeypatch.setattr(vae, "use_tiling", True)
    full = FullDevice(pipeline(sd3))
    with pytest.raises(OutOfMemory) as failed:
        generate(sd3, save_memory=True)
    full.remove()
    assert failed.value.tried == ()
    assert (vae.use_slicing, vae.use_tiling) == (False, True)


def test_the_measures_of_a_run_are_a_warning(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_movable(sd3, monkeypatch)
    output = generate(sd3, save_memory=True, num_images=2)
    assert output.warnings == (f"memory was short: {ONE_AT_A_TIME}, {IN_TILES}, {MOVED}",)
    assert generate(sd3).warnings == ()


# -- after the run --------------------------------------------------------------------------------


def test_an_out_of_memory_error_restores_the_model_and_frees_all_tensors(
    model_folder: Folder,
    load: Load,
    tmp_path_factory: pytest.TempPathFactory,
    shared_runner: Shared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = {"family": "flux", "blocks": 2}
    file = save_adapter(
        pipeline(shared_runner(**family)), tmp_path_factory.mktemp("adapters") / "ink"
    )
    runner = load(model_folder(**family), adapters={"ink": str(file)})
    make_movable(runner, monkeypatch)
    pipe = pipeline(runner)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    before = pixels(generate(runner, num_inference_steps=3))
    full = FullDevice(pipe)
    failures: list[OutOfMemory] = []
    gc.disable()
    try:
        for save_memory in (False, True):
            with pytest.raises(OutOfMemory) as failed:
                generate(runner, save_memory=save_memory, num_images=2, adapters={"ink": 1})
            failures.append(failed.value)  # the exceptions must not reference a tensor
        assert [tensor() for tensor in full.tensors] == [None] * len(full.tensors)
    finally:
        gc.enable()
        full.remove()
    assert len(full.tensors) == 4
    assert pipe.transformer.is_cache_enabled
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (False, False)
    assert not [part for part in pipe.components.values() if hasattr(part, "_hf_hook")]
    assert pixels(generate(runner, num_inference_steps=3)) == before


def test_a_step_cache_and_adapters_work_while_parts_are_moved(
    model_folder: Folder,
    load: Load,
    tmp_path_factory: pytest.TempPathFactory,
    shared_runner: Shared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = {"family": "flux", "blocks": 2}
    file = save_adapter(
        pipeline(shared_runner(**family)), tmp_path_factory.mktemp("adapters") / "ink"
    )
    runner = load(model_folder(**family), adapters={"ink": str(file)})
    make_movable(runner, monkeypatch)
    pipeline(runner).transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    fields: dict[str, Any] = {"num_inference_steps": 3, "adapters": {"ink": 1}}
    before = pixels(generate(runner, **fields))
    assert pixels(generate(runner, save_memory=True, **fields)) == before
    assert pixels(generate(runner, **fields)) == before


# -- measures from the start ----------------------------------------------------------------------


def test_images_that_cannot_be_decoded_together_are_generated_one_at_a_time(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_movable(sd3, monkeypatch)
    least = min_decode_bytes(pipeline(sd3), images=2, width=32, height=32)
    assert least is not None
    set_free_bytes(sd3, least - 1, monkeypatch)
    short = generate(sd3, num_images=2)
    set_free_bytes(sd3, least, monkeypatch)
    enough = generate(sd3, num_images=2)
    # Moving parts is slow and does not help decoding: only the second attempt does it.
    assert short.warnings == (f"memory was short: {ONE_AT_A_TIME}, {IN_TILES}",)
    assert enough.warnings == ()
    assert pixels(short) == [*pixels(generate(sd3)), *pixels(generate(sd3, seed=8))]
    vae = pipeline(sd3).vae
    assert (vae.use_slicing, vae.use_tiling) == (False, False)


def test_unknown_free_memory_causes_no_measures(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_bytes(CPU) is None
    set_free_bytes(sd3, None, monkeypatch)
    assert generate(sd3, num_images=2).warnings == ()


def test_memory_that_torch_has_cached_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert free_bytes(torch.device("cuda")) == 140


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all new tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


@pytest.mark.parametrize(
    "family",
    ["stable_diffusion_3", "stable_diffusion_xl", "flux", "flux_2_klein", "hunyuan_dit", "z_image"],
)
def test_the_estimate_of_the_decoding_memory_is_at_most_10_percent_too_low(
    family: str, shared_runner: Shared
) -> None:
    pipe = pipeline(shared_runner(family))
    side, images = 256, 2
    least = min_decode_bytes(pipe, images=images, width=side, height=side)
    assert least is not None
    smaller = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    latents = torch.zeros(images, pipe.vae.config.latent_channels, side // smaller, side // smaller)
    with torch.no_grad(), LiveBytes() as live:
        pipe.vae.decode(latents)
    assert least <= live.most < 1.1 * least


@pytest.mark.parametrize("family", ["qwen_image", "hunyuan_image"])
def test_other_kinds_of_autoencoders_have_no_estimate(family: str, shared_runner: Shared) -> None:
    pipe = pipeline(shared_runner(family))
    assert min_decode_bytes(pipe, images=8, width=2048, height=2048) is None


def test_slicing_needs_the_memory_of_one_image_and_tiling_has_no_estimate(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(sd3)
    size = {"width": 64, "height": 32}
    one = min_decode_bytes(pipe, images=1, **size)
    assert one is not None
    assert min_decode_bytes(pipe, images=8, **size) == 8 * one
    monkeypatch.setattr(pipe.vae, "use_slicing", True)
    assert min_decode_bytes(pipe, images=8, **size) == one
    monkeypatch.setattr(pipe.vae, "use_tiling", True)
    assert min_decode_bytes(pipe, images=8, **size) is None


def test_parts_on_several_devices_have_no_estimate(
    sd3: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline(sd3), "hf_device_map", {"vae": 1})
    assert min_decode_bytes(pipeline(sd3), images=1, width=64, height=64) is None
