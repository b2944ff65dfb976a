"""Loading of models: refused folders, code and devices, and the use of the hub's cache."""

import gc
import json
import logging
import re
import select
import socket
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import diffusers.utils.constants
import pytest
import torch
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from consumer.ports.model import ModelMisconfigured, ModelUnavailable
from consumer.runners import ModelConfig, ModelRunner, libraries, weights
from consumer.runners.device import Placement, place
from consumer.runners.image_to_text import vision_loading
from consumer.runners.libraries import reported_warnings
from consumer.runners.source import Download, locate_model
from consumer.runners.text_to_image import pipeline_loading
from consumer.runners.text_to_image.pipeline_loading import text_to_image_class
from generation_contracts import Task, TextToImageRequest
from generation_contracts.base import DEFAULT_QUEUES
from tests.integration.small_runs import (
    generate_image,
    generate_text,
    largest_difference,
    load_error,
    pipeline,
)
from tests.support.tiny_models import Folder, Load

SD3, VISION = "stable_diffusion_3", "vision_language"
DOWNLOADS: dict[Task, Download] = {
    Task.TEXT_TO_IMAGE: pipeline_loading.download,
    Task.IMAGE_TO_TEXT: vision_loading.download,
}


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# -- imports and folders --------------------------------------------------------------------------


def test_importing_the_runners_imports_no_model_library() -> None:
    code = (
        "import sys, consumer.runners as r; from generation_contracts import Task;"
        "r.create_runner(Task.TEXT_TO_IMAGE, r.ModelConfig()); "
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_model_imports_only_its_libraries_and_freezes_their_objects() -> None:
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


def test_a_missing_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    assert load_error(tmp_path / "no-such-model") == (
        f"MODEL_ID: there is no folder {tmp_path / 'no-such-model'}"
    )


@pytest.mark.parametrize(
    ("index", "line"),
    [
        pytest.param(None, "there is no model_index.json in it", id="missing"),
        pytest.param("{", "its model_index.json cannot be read", id="incomplete"),
        pytest.param("[]", "its model_index.json cannot be read", id="list"),
        pytest.param("\x00", "its model_index.json cannot be read", id="null byte"),
    ],
)
def test_a_missing_or_broken_index_is_refused(index: str | None, line: str, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    if index is not None:
        (folder / "model_index.json").write_text(index)
    assert load_error(folder) == f"broken: {line}"


def test_weights_that_exist_only_as_a_variant_are_loaded(
    own_folder: Folder, load: Load, shared_runner: Callable[[str], ModelRunner]
) -> None:
    folder = own_folder(SD3)
    for part in ("vae", "transformer", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert largest_difference(generate_image(load(folder)), generate_image(shared_runner(SD3))) == 0


def test_a_single_file_is_refused(model_folder: Folder) -> None:
    file = model_folder(SD3) / "vae" / "diffusion_pytorch_model.safetensors"
    assert load_error(file) == (
        f"MODEL_ID: {file} is a file: a model is a folder with its configuration and weights, "
        "or an id on the hub"
    )


# -- damaged folders ------------------------------------------------------------------------------

Change = Callable[[Path], None]


def without(pattern: str) -> Change:
    """Delete the files that match a pattern."""

    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def with_text(file: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_text(text)

    return change


def with_values(file: str, **values: Any) -> Change:
    """Set keys of a JSON file."""
    return lambda folder: rewrite(folder / file, lambda content: content.update(values))


def with_index(**parts: Any) -> Change:
    return with_values("model_index.json", **parts)


def without_key(file: str, key: str) -> Change:
    return lambda folder: rewrite(folder / file, lambda content: content.pop(key))


def without_weight(file: str, ending: str) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / file)
        name = next(name for name in weights if name.endswith(ending))
        remaining = {n: t for n, t in weights.items() if n != name}
        save_file(remaining, folder / file, metadata={"format": "pt"})

    return change


def with_pickled_weights(folder: Path) -> None:
    safe = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()


def with_truncated_weights(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


ABSENT = [None, None]
DIFFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        pytest.param(
            without(f"vae/{DIFFUSION_WEIGHTS}"),
            "cannot be loaded: .*diffusion_pytorch_model",
            id="no weights",
        ),
        pytest.param(
            with_pickled_weights,
            "vae: its weights are pickled, which can hold code and is not read: "
            r"convert them to \.safetensors$",
            id="pickled weights",
        ),
        pytest.param(with_truncated_weights, "cannot be loaded: ", id="truncated weights"),
        pytest.param(
            without("tokenizer/*.json"), "tokenizer: its vocabulary is missing", id="no vocabulary"
        ),
        pytest.param(with_text("vae/config.json", "{"), "cannot be loaded: ", id="broken config"),
        pytest.param(
            with_index(scheduler=["diffusers", "NoSuchScheduler"]),
            "cannot be loaded: ",
            id="unknown scheduler",
        ),
        pytest.param(
            with_index(transformer=["diffusers", "AutoencoderKL"]),
            "transformer has the class AutoencoderKL instead of SD3Transformer2DModel$",
            id="denoiser of another class",
        ),
        pytest.param(
            with_index(tokenizer_2=ABSENT),
            "no tokenizer_2: the first run failed: ",
            id="no tokenizer",
        ),
        pytest.param(
            with_index(text_encoder=ABSENT),
            "no text_encoder: the first run failed: ",
            id="no text encoder",
        ),
        pytest.param(with_index(vae=ABSENT), "no vae: the first run failed: ", id="no vae"),
        pytest.param(
            with_index(scheduler=ABSENT), "no scheduler: the first run failed: ", id="no scheduler"
        ),
        pytest.param(
            without_key("vae/config.json", "shift_factor"),
            "vae without shift_factor: the first run failed: ",
            id="no shift factor",
        ),
        *(
            pytest.param(
                without_weight(f"{part}/{file}", weight),
                rf"{part}: 1 weights are missing, such as \S*{weight}$",
                id=f"weight of {part}",
            )
            for part, file, weight in (
                ("transformer", DIFFUSION_WEIGHTS, "proj_out.weight"),
                ("vae", DIFFUSION_WEIGHTS, "decoder.conv_out.bias"),
                ("text_encoder_3", "model.safetensors", "final_layer_norm.weight"),
                ("text_encoder", "model.safetensors", "final_layer_norm.bias"),
            )
        ),
    ],
)
def test_a_damaged_pipeline_folder_is_refused(
    change: Change, line: str, own_folder: Folder
) -> None:
    folder = own_folder(SD3)
    change(folder)
    assert re.match(f"stable_diffusion_3: {line}", load_error(folder))


# -- warnings of the libraries --------------------------------------------------------------------


def unknown_weight(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "of_another_version": torch.zeros(2)}, file)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_values("vae/config.json", of_another_version=True), id="key of the vae"),
        pytest.param(
            with_values("scheduler/scheduler_config.json", of_another_version=True),
            id="key of the scheduler",
        ),
        pytest.param(unknown_weight, id="weight of the transformer"),
    ],
)
def test_a_library_warning_about_an_unknown_key_or_weight_is_logged_once(
    change: Callable[[Path], None], own_folder: Folder, load: Load
) -> None:
    folder = own_folder(SD3)
    change(folder)
    with capture_logs() as logs:
        load(folder)
    (warning,) = [line for line in logs if line["event"] == "library_warning"]
    assert warning["library"] == "diffusers"
    assert "of_another_version" in warning["detail"]


def test_library_warnings_are_logged_in_one_line_without_folders_while_loading(
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
        ("FluxImg2ImgPipeline", "does not generate images from a text alone"),
        ("HunyuanVideoPipeline", "does not generate images from a text alone"),
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
def test_a_class_that_generates_no_images_from_text_is_refused(
    class_name: object, line: str, own_folder: Folder
) -> None:
    folder = own_folder(SD3)
    with_index(_class_name=class_name)(folder)
    assert line in load_error(folder)


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
def test_text_to_image_classes_are_accepted(class_name: str) -> None:
    found = text_to_image_class({"_class_name": class_name}, "a model")
    assert found.__name__ == class_name


def test_remote_code_is_turned_off_for_the_whole_process() -> None:
    # diffusers reads the variable at its import, so the runners' package must be imported first.
    assert diffusers.utils.constants.DIFFUSERS_DISABLE_REMOTE_CODE is True


def test_code_of_a_model_is_not_run(own_folder: Folder, tmp_path: Path) -> None:
    folder, mark = own_folder(SD3), tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n"
    (folder / "transformer" / "own.py").write_text(code)
    (folder / "pipeline.py").write_text(code)
    with_index(transformer=["own", "Own"])(folder)
    assert load_error(folder) == (
        "stable_diffusion_3: transformer: own.Own is not in diffusers or transformers, and "
        "code that comes with a model is not run"
    )
    assert not mark.exists()


def test_code_of_a_vision_language_model_is_not_run(own_folder: Folder, tmp_path: Path) -> None:
    folder, mark = own_folder(VISION), tmp_path / "ran"
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    own = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}
    with_values("config.json", model_type="own", auto_map=own)(folder)
    assert "cannot be loaded" in load_error(folder, Task.IMAGE_TO_TEXT)
    assert not mark.exists()


# -- parts and types ------------------------------------------------------------------------------


def test_a_part_that_the_index_lists_as_absent_is_not_loaded(
    own_folder: Folder, load: Load
) -> None:
    folder = own_folder(SD3)
    with_index(text_encoder_3=ABSENT, tokenizer_3=ABSENT)(folder)
    model: Any = load(folder)._model
    assert model._pipe.text_encoder_3 is None


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_vision_language_model_is_loaded_with_the_configured_type(
    dtype: str, expected: torch.dtype, model_folder: Folder, load: Load
) -> None:
    runner = load(model_folder(VISION), Task.IMAGE_TO_TEXT, dtype=dtype)
    model: Any = runner._model
    assert {p.dtype for p in model._model.parameters()} == {expected}
    assert model.description.info.dtype == str(expected).removeprefix("torch.")


def test_a_model_that_reads_no_images_is_refused(model_folder: Folder) -> None:
    line = load_error(model_folder(SD3) / "text_encoder_3", Task.IMAGE_TO_TEXT)
    assert line == "text_encoder_3: t5 does not generate text from images"


# -- the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty cache of the hub, without a hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def put_into_cache(hub_cache: Path, folder: Path) -> None:
    """Make a folder the snapshot of `tiny/model` at `main`."""
    repository = hub_cache / "models--tiny--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(folder)


@pytest.mark.parametrize(
    ("family", "task"), [(SD3, Task.TEXT_TO_IMAGE), (VISION, Task.IMAGE_TO_TEXT)]
)
def test_the_description_of_a_model_of_the_hub_has_its_commit(
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

    def was_called(self) -> bool:
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
@pytest.mark.parametrize("task", list(DEFAULT_QUEUES))
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
    needs_hub = revision != COMMIT
    assert silent_hub.was_called() is needs_hub
    assert [line["event"] for line in logs] == ["hub_not_used"] * needs_hub


@pytest.mark.parametrize("revision", [None, COMMIT], ids=str)
@pytest.mark.parametrize("task", list(DEFAULT_QUEUES))
def test_a_silent_hub_times_out(task: Task, revision: str | None, silent_hub: SilentHub) -> None:
    line = load_error("tiny/unknown", task, revision=revision)
    assert "the hub cannot be reached (" in line
    assert silent_hub.was_called()


def test_an_incomplete_copy_is_not_used(
    silent_hub: SilentHub, hub_cache: Path, model_folder: Folder
) -> None:
    put_into_cache(hub_cache, model_folder(VISION))
    missing = TreeCacheEntry(size=1, blob_id="0" * 40)
    repository = str(hub_cache / "models--tiny--model")
    write_tree_cache(repository, COMMIT, {"model-2-of-2.safetensors": missing})
    line = load_error("tiny/model", Task.IMAGE_TO_TEXT, revision=COMMIT)
    assert "has no complete copy" in line
    assert silent_hub.was_called()


def test_a_revision_of_a_folder_is_refused(model_folder: Folder) -> None:
    line = "MODEL_REVISION: only a model of the hub has revisions"
    assert load_error(model_folder(SD3), revision="main") == line
    assert load_error("", revision="main") == line


@pytest.mark.parametrize("task", list(DEFAULT_QUEUES))
def test_a_model_that_is_not_in_the_cache_is_refused(task: Task, hub_cache: Path) -> None:
    line = load_error("tiny/unknown", task)
    assert line.startswith("MODEL_ID: tiny/unknown cannot be loaded: the hub cannot be reached (")


class Refuses(BaseHTTPRequestHandler):
    """A hub that refuses each request with a status and its error code."""

    answer: tuple[int, str]

    def do_GET(self) -> None:
        status, code = self.answer
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name that the server calls

    def log_message(self, *_: object) -> None:
        """Write nothing to standard error."""


@pytest.fixture
def refusing_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a hub that refuses each request as `Refuses.answer` says; yield its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        hub = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
        yield hub
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (401, "RepoNotFound", "MODEL_ID: {hub} has no model tiny/unknown, or it is private: "),
        (403, "GatedRepo", "MODEL_ID: tiny/unknown is gated: accept its terms at {hub}/tiny/"),
        (404, "RevisionNotFound", "MODEL_REVISION: tiny/unknown has no revision gone"),
    ],
    ids=["not found", "gated", "no revision"],
)
def test_a_refusal_of_the_hub_names_the_setting(
    status: int, code: str, line: str, refusing_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refuses, "answer", (status, code), raising=False)
    config = ModelConfig(model_id="tiny/unknown", revision="gone")
    task = Task.IMAGE_TO_TEXT
    with pytest.raises(ModelUnavailable) as refused, locate_model(task, config, DOWNLOADS[task]):
        pass
    assert str(refused.value).startswith(line.format(hub=refusing_hub))
    assert isinstance(refused.value, ModelMisconfigured) is (code != "GatedRepo")


def test_warnings_of_an_import_are_logged_at_debug_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "noisy_at_import.py").write_text(
        "import logging\n"
        "logging.getLogger('bitsandbytes.cpu').warning('pip install kernels')\n"
        "logging.getLogger('torchao.enum').error('a failure')\n"
        "logging.getLogger('checks').warning('of another module')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with capture_logs() as logs:
        libraries.import_frozen("noisy_at_import")
    assert logs == [
        {
            "event": "library_import_warning",
            "log_level": "debug",
            "library": "bitsandbytes",
            "detail": "pip install kernels",
        }
    ]
    assert caplog.messages == ["a failure", "of another module"]


# -- devices and options --------------------------------------------------------------------------


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
@pytest.mark.parametrize("task", list(DEFAULT_QUEUES))
def test_a_missing_device_is_refused_before_anything_is_loaded(
    options: dict[str, Any], line: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert load_error("no/model", task, **options) == line


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (True, True, "cuda", torch.bfloat16),
        (False, True, "mps", torch.float32),
        (False, False, "cpu", torch.float32),
    ],
)
def test_auto_selects_the_best_device_and_its_type(
    cuda: bool, mps: bool, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    placement = place(ModelConfig())
    assert (placement.device.type, placement.dtype) == (device, dtype)
    assert place(ModelConfig(dtype="float16")).dtype is torch.float16


def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the CPU stand in for a GPU; return the list of device maps that transformers gets."""
    maps: list[Any] = []
    read = PreTrainedModel.from_pretrained.__func__

    def record(model_class: type, *positional: Any, **options: Any) -> Any:
        maps.append(options.get("device_map"))
        return read(model_class, *positional, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(record))
    monkeypatch.setattr(weights, "_OWN_MEMORY", {"cpu"})
    return maps


def test_weights_loaded_directly_to_the_device_give_the_same_images(
    shared_runner: Callable[[str], ModelRunner],
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = generate_image(shared_runner(SD3))
    device_maps = cpu_for_gpu(monkeypatch)
    runner = load(model_folder(SD3))
    pipe = pipeline(runner)
    assert device_maps == ["cpu"] * 3  # of the text encoders
    for part in (pipe.transformer, pipe.vae):
        assert part.hf_device_map == {"": torch.device("cpu")}
    assert not any(hasattr(part, "_hf_hook") for part in (pipe.transformer, pipe.text_encoder))
    assert pipe.hf_device_map is None
    assert generate_image(runner).tobytes() == expected.tobytes()


def test_weights_loaded_directly_to_the_device_give_the_same_texts(
    shared_runner: Callable[[str], ModelRunner],
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = generate_text(shared_runner(VISION))
    device_maps = cpu_for_gpu(monkeypatch)
    runner = load(model_folder(VISION), Task.IMAGE_TO_TEXT)
    assert device_maps == ["cpu"]
    assert generate_text(runner) == expected


@pytest.mark.parametrize(
    "other",
    [{"offload": "model"}, {"device_map": "balanced"}, {"quantization": "torchao-int8"}],
    ids=["offload", "device map", "quantization"],
)
def test_weights_are_loaded_directly_unless_an_option_places_them(other: dict[str, Any]) -> None:
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    assert weights.direct_load_kwargs(gpu, ModelConfig()) == {"device_map": "cuda"}
    assert weights.direct_load_kwargs(gpu, ModelConfig(**other)) == {}
    cpu = Placement(torch.device("cpu"), torch.float32)
    assert weights.direct_load_kwargs(cpu, ModelConfig()) == {}


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("flux", ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
        (SD3, ["SD3Transformer2DModel"]),  # diffusers lists no repeated blocks for it
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
def test_close_drops_the_weights_before_it_releases_the_memory(  # noqa: PLR0917 - fixtures
    family: str,
    task: Task,
    module: str,
    weights: str,
    model_folder: Folder,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = load(model_folder(family), task)
    weight_owner = weakref.ref(getattr(runner._model, weights))
    freed: list[bool] = []

    def observe(_: torch.device) -> None:
        gc.collect()
        freed.append(weight_owner() is None)

    monkeypatch.setattr(f"consumer.runners.{module}.release", observe)
    runner.close()
    assert freed == [True]
    runner.close()
    with pytest.raises(ModelUnavailable, match="no model is loaded"):
        runner.check(TextToImageRequest(prompt="a cat"))
