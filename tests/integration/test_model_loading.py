"""Loading: what is refused, and that each refusal is one clear line without a path."""

import gc
import json
import logging
import select
import socket
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers.utils.constants
import pytest
import torch
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from consumer.ports.model import ModelUnavailable
from consumer.runners import ModelConfig, ModelRunner, create_runner, weights
from consumer.runners.device import Placement, place
from consumer.runners.image_to_text import vision_loading
from consumer.runners.libraries import reported_warnings
from consumer.runners.source import Download, locate_model
from consumer.runners.text_to_image import pipeline_loading
from consumer.runners.text_to_image.pipeline_loading import text_to_image_class
from generation_contracts import Task, TextToImageRequest
from tests.integration.small_runs import largest_difference, made, pipeline, written
from tests.support.tiny_models import Folder, Load

SD3, VISION = "stable_diffusion_3", "vision_language"
DOWNLOADS: dict[Task, Download] = {
    Task.TEXT_TO_IMAGE: pipeline_loading.download,
    Task.IMAGE_TO_TEXT: vision_loading.download,
}


def refusal(folder: Path | str, task: Task = Task.TEXT_TO_IMAGE, **options: Any) -> str:
    runner = create_runner(task, ModelConfig(model_id=str(folder), **options))
    with pytest.raises(ModelUnavailable) as refused:
        runner.load()
    line = str(refused.value)
    assert "\n" not in line
    if isinstance(folder, Path):
        assert str(folder.parent) not in line
    assert refused.value.__cause__ is None
    return line


def without_weight(file: Path, ending: str) -> None:
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(ending))
    save_file({n: t for n, t in weights.items() if n != name}, file, metadata={"format": "pt"})


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# -- the folder -----------------------------------------------------------------------------------


def test_importing_the_runners_imports_no_library() -> None:
    code = (
        "import sys, consumer.runners as r; from generation_contracts import Task;"
        "r.create_runner(Task.TEXT_TO_IMAGE, r.ModelConfig()); "
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_model_imports_its_own_libraries_and_no_look_for_garbage_meets_them() -> None:
    code = (
        "import gc, sys; from consumer.runners import libraries;"
        "libraries.import_frozen('consumer.runners.image_to_text.vision_language');"
        "others = {'diffusers', 'peft', 'bitsandbytes', 'gguf', 'nats', 'minio', 'opentelemetry'};"
        "print(gc.isenabled(), gc.get_freeze_count() > 10 * len(gc.get_objects()),"
        " *others & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=150
    )
    assert done.stdout == "True True\n"


def test_a_folder_that_is_not_there_is_told_by_its_name(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no-such-model") == "MODEL_ID: there is no folder no-such-model"


def test_a_folder_without_an_index_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert refusal(folder) == "empty: there is no model_index.json in it"
    assert refusal(folder, Task.IMAGE_TO_TEXT) == "empty: there is no config.json in it"


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_an_index_that_cannot_be_read_is_told(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model_index.json").write_text(content)
    assert refusal(folder) == "broken: its model_index.json cannot be read"


def test_a_part_without_files_is_told_without_a_path(own_folder: Folder) -> None:
    folder = own_folder(SD3)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    line = refusal(folder)
    assert line.startswith("stable_diffusion_3: cannot be loaded: ")
    assert "diffusion_pytorch_model" in line


def test_pickled_weights_are_not_read(own_folder: Folder) -> None:
    folder = own_folder(SD3)
    safe = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    assert refusal(folder) == (
        "stable_diffusion_3: vae: its weights are pickled, which can hold code and is not read: "
        "convert them to .safetensors"
    )


def test_weights_that_are_there_as_a_variant_only_are_read(
    own_folder: Folder, load: Load, shared_runner: Callable[[str], ModelRunner]
) -> None:
    folder = own_folder(SD3)
    for part in ("vae", "transformer", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert largest_difference(made(load(folder)), made(shared_runner(SD3))) == 0


def test_a_single_file_is_no_model(model_folder: Folder) -> None:
    file = model_folder(SD3) / "vae" / "diffusion_pytorch_model.safetensors"
    assert refusal(file) == (
        "MODEL_ID: diffusion_pytorch_model.safetensors is a file: a model is a folder with its "
        "configuration and weights, or an id on the hub"
    )


def without_a_part(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        absent = {name: [None, None]}
        rewrite(folder / "model_index.json", lambda index: index.update(absent))

    return change


def without_the_shift_of_its_latents(folder: Path) -> None:
    rewrite(folder / "vae" / "config.json", lambda config: config.pop("shift_factor"))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        pytest.param(without_a_part("tokenizer_2"), "no tokenizer_2", id="tokenizer"),
        pytest.param(without_a_part("text_encoder"), "no text_encoder", id="text encoder"),
        pytest.param(without_a_part("vae"), "no vae", id="vae"),
        pytest.param(without_a_part("scheduler"), "no scheduler", id="scheduler"),
        pytest.param(without_the_shift_of_its_latents, "vae without shift_factor", id="shift"),
    ],
)
def test_a_pipeline_that_would_fail_at_each_request_stops_the_start(
    spoil: Callable[[Path], None], part: str, own_folder: Folder
) -> None:
    folder = own_folder(SD3)
    spoil(folder)
    assert refusal(folder).startswith(f"stable_diffusion_3: {part}: the first run failed: ")


# -- what the libraries drop ----------------------------------------------------------------------


def unknown_key(part: str, file: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / part / file, lambda c: c.update(of_another_version=True))


def unknown_weight(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "of_another_version": torch.zeros(2)}, file)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(unknown_key("vae", "config.json"), id="key of the vae"),
        pytest.param(unknown_key("scheduler", "scheduler_config.json"), id="key of the scheduler"),
        pytest.param(unknown_weight, id="weight of the transformer"),
    ],
)
def test_what_the_libraries_drop_while_they_load_is_logged_once(
    change: Callable[[Path], None], own_folder: Folder, load: Load
) -> None:
    folder = own_folder(SD3)
    change(folder)
    with capture_logs() as logs:
        load(folder)
    (warning,) = [line for line in logs if line["event"] == "library_warning"]
    assert warning["library"] == "diffusers"
    assert "of_another_version" in warning["detail"]


def test_what_a_library_warns_of_is_one_line_without_folders_and_only_while_loading(
    tmp_path: Path,
) -> None:
    logger = logging.getLogger("diffusers.models.any")
    with capture_logs() as logs:
        with reported_warnings():
            for _ in range(2):
                logger.warning("ignored:\n  %s", tmp_path / "config.json")
            warnings.warn_explicit("dropped", UserWarning, "site-packages/peft/config.py", 1)
        logger.warning("a prompt was cut")
    assert [(line["library"], line["detail"]) for line in logs] == [
        ("diffusers", "ignored: config.json"),
        ("peft", "dropped"),
    ]
    assert not logger.isEnabledFor(logging.WARNING)


# -- the class ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "line"),
    [
        ("NoSuchPipeline", "names no pipeline class of diffusers"),
        (None, "names no pipeline class of diffusers"),
        (["pipeline", "OwnPipeline"], "names no pipeline class of diffusers"),
        ("AutoencoderKL", "names no pipeline class of diffusers"),
        ("StableDiffusion3Img2ImgPipeline", "does not generate images from a text alone"),
        ("StableDiffusion3InpaintPipeline", "does not generate images from a text alone"),
        ("StableDiffusionXLControlNetPipeline", "does not generate images from a text alone"),
        ("QwenImageEditPipeline", "does not generate images from a text alone"),
        ("FluxControlPipeline", "does not generate images from a text alone"),
        ("EasyAnimatePipeline", "does not generate images from a text alone"),
        ("KandinskyV22CombinedPipeline", "does not generate images from a text alone"),
        ("WanPipeline", "does not generate images from a text alone"),
        ("StableAudioPipeline", "does not generate images from a text alone"),
        ("StableCascadePriorPipeline", "does not generate images from a text alone"),
        ("LongCatImagePipeline", "has no callback at its steps"),
    ],
)
def test_a_class_that_makes_no_images_from_text_is_refused(
    class_name: object, line: str, own_folder: Folder
) -> None:
    folder = own_folder(SD3)
    rewrite(folder / "model_index.json", lambda index: index.update(_class_name=class_name))
    assert line in refusal(folder)


@pytest.mark.parametrize(
    "class_name",
    [
        "FluxPipeline",
        "Flux2Pipeline",
        "FluxKontextPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionPipeline",
        "HunyuanDiTPipeline",
        "HunyuanImagePipeline",
        "QwenImagePipeline",
        "ZImagePipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
        "CogView4Pipeline",
        "Lumina2Pipeline",
    ],
)
def test_text_to_image_classes_are_taken(class_name: str) -> None:
    found = text_to_image_class({"_class_name": class_name}, "a model")
    assert found.__name__ == class_name


def test_a_denoiser_of_another_class_is_refused(own_folder: Folder) -> None:
    folder = own_folder(SD3)
    rewrite(
        folder / "model_index.json",
        lambda index: index.update(transformer=["diffusers", "AutoencoderKL"]),
    )
    line = refusal(folder)
    assert line == (
        "stable_diffusion_3: transformer has the class AutoencoderKL "
        "instead of SD3Transformer2DModel"
    )


def test_remote_code_is_turned_off_for_the_whole_process() -> None:
    # Read once, when diffusers is imported: the runners' package must have come first.
    assert diffusers.utils.constants.DIFFUSERS_DISABLE_REMOTE_CODE is True


def test_code_that_came_with_a_model_is_not_run(own_folder: Folder, tmp_path: Path) -> None:
    folder, mark = own_folder(SD3), tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n"
    (folder / "transformer" / "own.py").write_text(code)
    (folder / "pipeline.py").write_text(code)
    rewrite(folder / "model_index.json", lambda index: index.update(transformer=["own", "Own"]))
    assert refusal(folder) == (
        "stable_diffusion_3: transformer: own.Own is not in diffusers or transformers, and "
        "code that comes with a model is not run"
    )
    assert not mark.exists()


def test_code_that_came_with_a_vision_language_model_is_not_run(
    own_folder: Folder, tmp_path: Path
) -> None:
    folder, mark = own_folder(VISION), tmp_path / "ran"
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    own = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}
    rewrite(folder / "config.json", lambda c: c.update(model_type="own", auto_map=own))
    assert "cannot be loaded" in refusal(folder, Task.IMAGE_TO_TEXT)
    assert not mark.exists()


# -- the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "file", "weight"),
    [
        ("transformer", "diffusion_pytorch_model", "proj_out.weight"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_out.bias"),
        ("text_encoder_3", "model", "final_layer_norm.weight"),
        ("text_encoder", "model", "final_layer_norm.bias"),
    ],
)
def test_a_missing_weight_is_not_made_up(
    part: str, file: str, weight: str, own_folder: Folder
) -> None:
    folder = own_folder(SD3)
    without_weight(folder / part / f"{file}.safetensors", weight)
    line = refusal(folder)
    assert line.startswith(f"stable_diffusion_3: {part}: 1 weights are missing, such as ")
    assert line.endswith(weight)


def test_a_missing_weight_of_a_vision_language_model_is_not_made_up(own_folder: Folder) -> None:
    folder = own_folder(VISION)
    without_weight(folder / "model.safetensors", "layers.1.mlp.up_proj.weight")
    line = refusal(folder, Task.IMAGE_TO_TEXT)
    assert line.startswith("vision_language: 1 weights are missing, such as ")


def test_a_part_that_is_saved_as_absent_stays_absent(own_folder: Folder, load: Load) -> None:
    folder = own_folder(SD3)
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    rewrite(folder / "model_index.json", lambda index: index.update(absent))
    model: Any = load(folder)._model
    assert model._pipe.text_encoder_3 is None


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_vision_language_model_has_the_type_asked_for(
    dtype: str, wanted: torch.dtype, model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder(VISION), Task.IMAGE_TO_TEXT, dtype=dtype)
    model: Any = runner._model
    assert {p.dtype for p in model._model.parameters()} == {wanted}
    assert model.description.info.dtype == str(wanted).removeprefix("torch.")


def test_a_model_that_reads_no_images_is_refused(model_folder: Folder) -> None:
    line = refusal(model_folder(SD3) / "text_encoder_3", Task.IMAGE_TO_TEXT)
    assert line == "text_encoder_3: t5 does not generate text from images"


def test_a_processor_without_a_chat_template_is_refused(own_folder: Folder) -> None:
    folder = own_folder(VISION)
    (folder / "chat_template.jinja").unlink()
    assert refusal(folder, Task.IMAGE_TO_TEXT) == (
        "vision_language: its processor has no chat template"
    )


# -- the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, and no hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def put_into_cache(hub_cache: Path, folder: Path) -> None:
    """Make a folder the snapshot of `tiny/model` at main."""
    repository = hub_cache / "models--tiny--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(folder)


@pytest.mark.parametrize(
    ("family", "task"), [(SD3, Task.TEXT_TO_IMAGE), (VISION, Task.IMAGE_TO_TEXT)]
)
def test_a_model_of_the_hub_is_told_with_its_commit(
    family: str, task: Task, hub_cache: Path, model_folder: Folder, load: Load
) -> None:
    put_into_cache(hub_cache, model_folder(family))
    runner = load("tiny/model", task)
    model: Any = runner._model
    assert model.description.info.id == "tiny/model"
    assert model.description.info.revision == COMMIT


class SilentHub:
    """A hub that accepts connections and never answers, as behind a firewall that drops."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def asked(self) -> bool:
        """Whether a client has connected."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def silent_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentHub]:
    with closing(SilentHub()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("consumer.runners.source.HUB_TIMEOUT", 0.2)
        yield hub


@pytest.mark.parametrize("revision", [None, "main", COMMIT], ids=str)
@pytest.mark.parametrize("task", list(Task))
def test_a_cached_model_needs_no_hub(
    task: Task,
    revision: str | None,
    silent_hub: SilentHub,
    hub_cache: Path,
    model_folder: Folder,
) -> None:
    folder = model_folder(SD3 if task is Task.TEXT_TO_IMAGE else VISION)
    put_into_cache(hub_cache, folder)
    config = ModelConfig(model_id="tiny/model", revision=revision)
    with capture_logs() as logs, locate_model(task, config, DOWNLOADS[task]) as source:
        assert (source.id, source.revision) == ("tiny/model", COMMIT)
        assert source.folder.resolve() == folder.resolve()
    asked = revision != COMMIT
    assert silent_hub.asked() is asked
    assert [line["event"] for line in logs] == ["hub_not_used"] * asked


@pytest.mark.parametrize("revision", [None, COMMIT], ids=str)
@pytest.mark.parametrize("task", list(Task))
def test_a_silent_hub_is_not_waited_for(
    task: Task, revision: str | None, silent_hub: SilentHub
) -> None:
    said = refusal("tiny/unknown", task, revision=revision)
    assert "the hub cannot be reached (" in said
    assert silent_hub.asked()


def test_a_copy_that_is_not_complete_is_not_used(
    silent_hub: SilentHub, hub_cache: Path, model_folder: Folder
) -> None:
    put_into_cache(hub_cache, model_folder(VISION))
    missing = TreeCacheEntry(size=1, blob_id="0" * 40)
    repository = str(hub_cache / "models--tiny--model")
    write_tree_cache(repository, COMMIT, {"model-2-of-2.safetensors": missing})
    said = refusal("tiny/model", Task.IMAGE_TO_TEXT, revision=COMMIT)
    assert "has no complete copy" in said
    assert silent_hub.asked()


def test_a_revision_of_a_folder_is_refused(model_folder: Folder) -> None:
    line = "MODEL_REVISION: only a model of the hub has revisions"
    assert refusal(model_folder(SD3), revision="main") == line
    assert refusal("", revision="main") == line


@pytest.mark.parametrize("task", list(Task))
def test_a_model_that_is_not_to_be_had_is_told(task: Task, hub_cache: Path) -> None:
    assert refusal("tiny/unknown", task).startswith("tiny/unknown: cannot be loaded: ")


# -- how it is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"device": "cuda"}, "MODEL_DEVICE: there is no cuda device for this process"),
        ({"device": "mps"}, "MODEL_DEVICE: there is no mps device for this process"),
        (
            {"device": "cpu", "offload": "model"},
            "MODEL_OFFLOAD: the device is cpu, there is nothing to offload from",
        ),
    ],
)
@pytest.mark.parametrize("task", list(Task))
def test_what_this_machine_lacks_is_told_before_anything_is_loaded(
    options: dict[str, Any], line: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert refusal("no/model", task, **options) == line


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (True, True, "cuda", torch.bfloat16),
        (False, True, "mps", torch.float32),
        (False, False, "cpu", torch.float32),
    ],
)
def test_auto_takes_the_best_device_and_its_type(
    cuda: bool, mps: bool, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    placement = place(ModelConfig())
    assert (placement.device.type, placement.dtype) == (device, dtype)
    assert place(ModelConfig(dtype="float16")).dtype is torch.float16


def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on the CPU stands in for a GPU; the device maps that transformers is then given."""
    maps: list[Any] = []
    read = PreTrainedModel.from_pretrained.__func__

    def note(model_class: type, *places: Any, **options: Any) -> Any:
        maps.append(options.get("device_map"))
        return read(model_class, *places, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(note))
    monkeypatch.setattr(weights, "_OWN_MEMORY", {"cpu"})
    return maps


def test_images_are_the_same_when_weights_go_straight_to_the_device(
    shared_runner: Callable[[str], ModelRunner],
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = made(shared_runner(SD3))
    device_maps = cpu_for_gpu(monkeypatch)
    runner = load(model_folder(SD3))
    pipe = pipeline(runner)
    assert device_maps == ["cpu"] * 3  # of the text encoders
    for part in (pipe.transformer, pipe.vae):
        assert part.hf_device_map == {"": torch.device("cpu")}
    assert not any(hasattr(part, "_hf_hook") for part in (pipe.transformer, pipe.text_encoder))
    assert pipe.hf_device_map is None
    assert made(runner).tobytes() == expected.tobytes()


def test_texts_are_the_same_when_weights_go_straight_to_the_device(
    shared_runner: Callable[[str], ModelRunner],
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = written(shared_runner(VISION))
    device_maps = cpu_for_gpu(monkeypatch)
    runner = load(model_folder(VISION), Task.IMAGE_TO_TEXT)
    assert device_maps == ["cpu"]
    assert written(runner) == expected


@pytest.mark.parametrize(
    "other", [{"offload": "model"}, {"device_map": "balanced"}, {"quantization": "torchao-int8"}]
)
def test_weights_go_straight_where_no_option_places_them(other: dict[str, Any]) -> None:
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    assert weights.direct_load_kwargs(gpu, ModelConfig()) == {"device_map": "cuda"}
    assert weights.direct_load_kwargs(gpu, ModelConfig(**other)) == {}
    cpu = Placement(torch.device("cpu"), torch.float32)
    assert weights.direct_load_kwargs(cpu, ModelConfig()) == {}


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("flux", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
        (SD3, ["SD3Transformer2DModel"]),  # diffusers knows of no repeated blocks in it
    ],
)
def test_compile_compiles_the_repeated_blocks_of_the_denoiser(
    family: str,
    blocks: list[str],
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        "torch.nn.Module.compile", lambda self, **_: compiled.append(type(self).__name__)
    )
    load(model_folder(family), compile=True, defaults={"width": 64, "height": 64})
    assert compiled == blocks


@pytest.mark.parametrize(
    ("family", "task", "module", "weights"),
    [
        (SD3, Task.TEXT_TO_IMAGE, "text_to_image.diffusion", "_pipe"),
        (VISION, Task.IMAGE_TO_TEXT, "image_to_text.vision_language", "_model"),
    ],
)
def test_closing_lets_go_of_the_weights_before_the_memory_is_given_back(  # noqa: PLR0917 - fixtures
    family: str,
    task: Task,
    module: str,
    weights: str,
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = load(model_folder(family), task)
    held = weakref.ref(getattr(runner._model, weights))
    gone: list[bool] = []

    def observe(_: torch.device) -> None:
        gc.collect()
        gone.append(held() is None)

    monkeypatch.setattr(f"consumer.runners.{module}.release", observe)
    runner.close()
    assert gone == [True]
    runner.close()
    with pytest.raises(ModelUnavailable, match="no model is loaded"):
        runner.check(TextToImageRequest(prompt="a cat"))
