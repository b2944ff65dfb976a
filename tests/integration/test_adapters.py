"""LoRA adapters: configured by name, applied to single jobs, and removed afterwards.

The tests compare images byte by byte with the images of a model that has loaded no adapter.
"""

# mypy: allow-untyped-calls

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from consumer.ports.model import (
    Interrupted,
    ModelError,
    ModelUnavailable,
    OutOfMemory,
    UnsupportedParameter,
)
from consumer.runners import ModelRunner, create_runner, options
from consumer.runners.config import ModelConfig
from consumer.runners.device import Placement
from consumer.runners.text_to_image import diffusion
from consumer.runners.text_to_image.adapter_files import find_adapters, require_loadable
from generation_contracts import Task, TextToImageRequest
from tests.support.model_runs import run_model
from tests.support.tiny_adapters import (
    FILE,
    RANK,
    add_weights,
    change_weights,
    pipeline,
    save_adapter,
    save_as_peft_does,
)
from tests.support.tiny_models import Folder, Load

Shared = Callable[..., ModelRunner]


def make_request(**fields: Any) -> TextToImageRequest:
    small = {"prompt": "a cat", "width": 32, "height": 32, "num_inference_steps": 2, "seed": 7}
    return TextToImageRequest(**{**small, **fields})


def pixels(runner: ModelRunner, *, save_memory: bool = False, **fields: Any) -> list[bytes]:
    request = make_request(**fields)
    runner.check(request)
    output = run_model(runner, request, [], save_memory=save_memory)
    return [image.image.tobytes() for image in output.images]


@pytest.fixture
def plain(shared_runner: Shared) -> ModelRunner:
    """Return a model that has loaded no adapter."""
    return shared_runner("stable_diffusion_3")


@pytest.fixture(scope="module")
def styled(
    model_folder: Folder, shared_runner: Shared, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelRunner]:
    """Load three adapters: of a folder, of a text encoder, and of a symbolic link."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = pipeline(shared_runner("stable_diffusion_3"))
    save_adapter(pipe, folder / "ink", seed=1)
    save_adapter(pipe, folder / "tale", seed=2, part="text_encoder", layers=("q_proj", "v_proj"))
    blob = save_adapter(pipe, folder / "blobs", seed=3).rename(folder / "blobs" / "4b1d")
    (folder / "wash.safetensors").symlink_to(blob)  # as in the hub's cache
    runner = create_runner(
        Task.TEXT_TO_IMAGE,
        ModelConfig(
            model_id=str(model_folder("stable_diffusion_3")),
            adapters={
                "wash": str(folder / "wash.safetensors"),
                "ink": str(folder / "ink"),
                "tale": str(folder / "tale"),
            },
        ),
    )
    runner.load()
    yield runner
    runner.close()


# -- jobs with adapters ---------------------------------------------------------------------------


def test_loaded_adapters_do_not_change_a_request_without_adapters(
    styled: ModelRunner, plain: ModelRunner
) -> None:
    assert pixels(styled, num_images=2) == pixels(plain, num_images=2)


@pytest.mark.parametrize("name", ["ink", "wash", "tale"])
def test_an_adapter_changes_only_the_images_of_its_requests(
    name: str, styled: ModelRunner, plain: ModelRunner
) -> None:
    without_adapter = pixels(plain)
    with_it = pixels(styled, adapters={name: 1})
    assert with_it != without_adapter
    assert pixels(styled) == without_adapter
    assert pixels(styled, adapters={name: 1}) == with_it
    assert pixels(styled, adapters={name: 0.5}) not in (with_it, without_adapter)


def test_several_adapters_are_combined_in_any_order(styled: ModelRunner) -> None:
    single = [pixels(styled, adapters={name: 1}) for name in ("ink", "wash", "tale")]
    together = pixels(styled, adapters={"ink": 1, "wash": 0.7, "tale": -1})
    assert together not in single
    assert pixels(styled, adapters={"tale": -1, "wash": 0.7, "ink": 1}) == together


def test_adapters_are_always_activated_in_the_same_order(styled: ModelRunner) -> None:
    # The order changes only the last bits of sums, which the images of a tiny model do not show.
    for adapters in ({"wash": 1.0, "ink": 1.0}, {"ink": 1.0, "wash": 1.0}):
        orders: list[list[str]] = []
        run_model(
            styled,
            make_request(adapters=adapters),
            [],
            on_step=lambda *_, seen=orders: seen.append(pipeline(styled).get_active_adapters()),
        )
        assert orders == [["ink", "wash"]] * 2


def test_an_adapter_with_weight_zero_is_not_applied(
    styled: ModelRunner, plain: ModelRunner
) -> None:
    assert pixels(styled, adapters={"ink": 0}) == pixels(plain)
    only_ink = pixels(styled, adapters={"ink": 1})
    assert pixels(styled, adapters={"wash": 0, "ink": 1}) == only_ink


def test_a_cancelled_job_leaves_no_adapter_active(styled: ModelRunner, plain: ModelRunner) -> None:
    steps: list[int] = []
    with pytest.raises(Interrupted):
        run_model(
            styled,
            make_request(adapters={"ink": 1, "tale": 1}),
            [],
            on_step=lambda step, _: steps.append(step),
            cancelled=lambda: bool(steps),
        )
    assert steps == [1]
    assert pixels(styled) == pixels(plain)


@pytest.mark.parametrize(
    ("error", "translated"), [(ValueError, ModelError), (torch.OutOfMemoryError, OutOfMemory)]
)
@pytest.mark.parametrize("save_memory", [False, True])
def test_a_failed_job_leaves_no_adapter_active(
    error: type[Exception],
    translated: type[Exception],
    *,
    save_memory: bool,
    styled: ModelRunner,
    plain: ModelRunner,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    hook = pipeline(styled).vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(translated):
        pixels(styled, save_memory=save_memory, adapters={"ink": 1, "tale": 1})
    hook.remove()
    assert pixels(styled) == pixels(plain)


def test_only_configured_adapters_are_accepted(styled: ModelRunner, plain: ModelRunner) -> None:
    with pytest.raises(UnsupportedParameter, match="there is no adapter other") as refused:
        pixels(styled, adapters={"ink": 1, "other": 1})
    assert refused.value.parameter == "adapters"
    with pytest.raises(UnsupportedParameter, match="there is no adapter ink"):
        pixels(plain, adapters={"ink": 1})


def test_the_output_reports_its_adapters(styled: ModelRunner) -> None:
    output = run_model(styled, make_request(adapters={"ink": 0.5}), [])
    assert output.parameters["adapters"] == {"ink": 0.5}


def test_adapters_can_be_switched_after_weights_were_moved_in_a_run(
    styled: ModelRunner, plain: ModelRunner
) -> None:
    # Offloading moves weights in inference mode, which turns them into inference tensors.
    transformer = pipeline(styled).transformer
    with torch.inference_mode():
        transformer.to(torch.float64).to(torch.float32)
    assert next(transformer.parameters()).is_inference()
    assert pixels(styled, adapters={"ink": 1}) != pixels(plain)
    assert pixels(styled) == pixels(plain)


# -- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["flux", "flux_2_klein", "stable_diffusion_xl", "qwen_image", "z_image"]
)
def test_a_family_with_adapters_gives_the_same_images_without_them(
    family: str, shared_runner: Shared, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    without_adapter = shared_runner(family)
    file = save_adapter(pipeline(without_adapter), tmp_path)
    runner = load(model_folder(family), adapters={"ink": str(file)})
    before = pixels(without_adapter)
    assert pixels(runner, adapters={"ink": 1}) != before
    assert pixels(runner) == before


def test_a_family_that_takes_no_adapters_does_not_start_with_them(
    shared_runner: Shared, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    file = save_adapter(pipeline(shared_runner("stable_diffusion_3")), tmp_path)
    with pytest.raises(ModelUnavailable, match="MODEL_ADAPTERS: HunyuanDiT takes no LoRA adapters"):
        load(model_folder("hunyuan_dit"), adapters={"ink": str(file)})


def with_unknown_layers(file: Path, _: Any) -> None:
    save_file({f"other.lora_{half}.weight": torch.zeros(2, 8) for half in "AB"}, file)


def without_lora_keys(file: Path, _: Any) -> None:
    save_file({"transformer.weight": torch.zeros(2, 8)}, file)


def with_broken_file(file: Path, _: Any) -> None:
    file.write_bytes(b"\xff" * 100)


def with_another_size(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent, wider=2)


def for_another_model(file: Path, _: Any) -> None:
    matrices = {f"transformer.deep.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(matrices, file)


def widening(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent, layers=("x_embedder",), wider=2)


def replacing_norms(file: Path, pipe: Any) -> None:
    add_weights(
        save_adapter(pipe, file.parent),
        transformer__transformer_blocks__0__attn__norm_q__weight=torch.zeros(16),
    )


def without_half(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent)
    change_weights(file, lambda name, w: None if ".lora_B." in name else (name, w))


def without_one_matrix(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent)
    lost = "blocks.0.attn.to_q.lora_A.weight"
    change_weights(file, lambda name, w: None if name.endswith(lost) else (name, w))


def with_dora_scale(file: Path, pipe: Any) -> None:
    scales = {"transformer__transformer_blocks__0__attn__to_q__dora_scale": torch.ones(16, 1)}
    add_weights(save_adapter(pipe, file.parent), **scales)


def as_loha(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent)
    change_weights(
        file,
        lambda name, w: (name.replace("lora_A.weight", "hada_w1_a").replace("B.weight", "b"), w),
    )


def as_ia3(file: Path, _: Any) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    save_file({f"{layer}.weight": torch.ones(8), f"{layer}.on_input": torch.zeros(1)}, file)


def with_nan_weights(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent)
    change_weights(file, lambda name, w: (name, w * float("nan") if "lora_B" in name else w))


def of_peft_without_config(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent)
    change_weights(file, lambda name, w: (name.replace("transformer.", "base_model.model.", 1), w))


def with_unet_prefix(file: Path, pipe: Any) -> None:
    save_adapter(pipe, file.parent)
    change_weights(file, lambda name, w: (name.replace("transformer.", "unet.", 1), w))


@pytest.mark.parametrize(
    ("family", "write", "message"),
    [
        ("stable_diffusion_3", without_half, "it has matrices without their other half, such as "),
        ("stable_diffusion_3", without_one_matrix, "it has matrices without their other half"),
        (
            "stable_diffusion_3",
            with_dora_scale,
            "it is a DoRA, which diffusers would apply as a plain",
        ),
        ("stable_diffusion_3", as_loha, "it is a LoHa adapter, which diffusers does not load"),
        ("stable_diffusion_xl", as_ia3, "it is an IA3 adapter, which diffusers does not load"),
        ("stable_diffusion_3", with_nan_weights, "it has weights that are not numbers"),
        (
            "stable_diffusion_3",
            of_peft_without_config,
            "it was saved by PEFT and its adapter_config.json is missing",
        ),
        ("stable_diffusion_3", with_unet_prefix, "none of its weights are for this model"),
        ("stable_diffusion_3", with_unknown_layers, "none of its weights are for this model"),
        ("stable_diffusion_3", without_lora_keys, "cannot be loaded: Invalid LoRA checkpoint"),
        ("stable_diffusion_3", with_broken_file, "cannot be loaded: "),
        ("stable_diffusion_3", with_another_size, "cannot be loaded: .*size mismatch"),
        ("stable_diffusion_3", for_another_model, "cannot be loaded: "),
        ("flux", widening, "it would change the model for all requests"),
        ("flux", replacing_norms, "it would change the model for all requests"),
    ],
)
def test_an_unsuitable_adapter_stops_the_start(
    *,
    family: str,
    write: Callable[[Path, Any], None],
    message: str,
    shared_runner: Shared,
    model_folder: Folder,
    load: Load,
    tmp_path: Path,
) -> None:
    write(tmp_path / FILE, pipeline(shared_runner(family)))
    with pytest.raises(ModelUnavailable, match=f"^MODEL_ADAPTERS: ink: {message}") as refused:
        load(model_folder(family), adapters={"ink": str(tmp_path)})
    assert str(tmp_path) not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_partly_applied_adapter_is_logged_and_reported_as_a_warning(
    shared_runner: Shared, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    pipe = pipeline(shared_runner("stable_diffusion_3"))
    file = save_adapter(pipe, tmp_path)
    with capture_logs() as logs:
        load(model_folder("stable_diffusion_3"), adapters={"ink": str(file)})
    (whole,) = [entry for entry in logs if entry["event"] == "adapter_loaded"]
    assert not [entry for entry in logs if entry["event"] == "library_warning"]
    deep = {f"transformer__deep__lora_{half}__weight": torch.zeros(2, 2) for half in "AB"}
    add_weights(file, **deep)
    with capture_logs() as logs:
        runner = load(model_folder("stable_diffusion_3"), adapters={"ink": str(file)})
    (part,) = [entry for entry in logs if entry["event"] == "adapter_loaded_in_part"]
    (warning,) = [entry for entry in logs if entry["event"] == "library_warning"]
    assert "deep.lora_A.weight" in warning["detail"]
    assert (part["adapter"], part["layers"], part["of"]) == (
        "ink",
        whole["layers"],
        whole["layers"] + 1,
    )
    line = f"adapter ink: {part['layers']} of its {part['of']} layers are for this model"
    assert warnings(runner, adapters={"ink": 1}) == (line,)
    assert warnings(runner, adapters={"ink": 0}) == warnings(runner) == ()


def warnings(runner: ModelRunner, **fields: Any) -> tuple[str, ...]:
    request = make_request(**fields)
    return run_model(runner, request, []).warnings


# -- formats of other programs --------------------------------------------------------------------

NAMED = (".weight", ".default.weight")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("stable_diffusion_3", [NAMED], id="stable_diffusion_3"),
        pytest.param("flux", [NAMED], id="flux"),
        pytest.param("qwen_image", [NAMED, ("transformer.", "")], id="qwen_image as DiffSynth"),
        pytest.param("z_image", [NAMED, ("transformer.", "")], id="z_image as DiffSynth"),
        pytest.param(
            "flux_2_klein", [("transformer.", "base_model.model.")], id="flux_2 as AI-Toolkit"
        ),
        pytest.param(
            "flux_2_klein", [NAMED, ("transformer.", "base_model.model.")], id="flux_2 with a name"
        ),
    ],
)
def test_the_keys_of_other_programs_give_the_same_adapter(
    *,
    family: str,
    changes: list[tuple[str, str]],
    shared_runner: Shared,
    model_folder: Folder,
    load: Load,
    tmp_path: Path,
) -> None:
    paths = {}
    for name in ("ink", "other"):
        file = save_adapter(pipeline(shared_runner(family)), tmp_path / name)
        paths[name] = str(file)
    for old, new in changes:
        change_weights(file, lambda key, w, old=old, new=new: (key.replace(old, new, 1), w))
    runner = load(model_folder(family), adapters=paths)
    ink, other = (latents(runner, adapters={name: 1}) for name in paths)
    assert torch.equal(ink, other)
    assert not torch.equal(ink, latents(runner))


def test_the_scale_in_the_metadata_is_also_applied_to_keys_with_an_adapter_name(
    plain: ModelRunner, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    file = save_adapter(pipeline(plain), tmp_path / "plain", layers=("to_q",))
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["to_q"]}
    metadata = {
        LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in config.items()})
    }
    paths = {"plain": str(file)}
    for name, suffix in (("scaled", ".weight"), ("named", ".default.weight")):
        weights = {key.replace(".weight", suffix): w for key, w in load_file(file).items()}
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file(weights, paths[name], metadata=metadata)
    runner = load(model_folder("stable_diffusion_3"), adapters=paths)
    twice = latents(runner, adapters={"plain": 2})
    assert not torch.allclose(latents(runner, adapters={"plain": 1}), twice, atol=1e-4)
    for name in ("scaled", "named"):
        assert torch.allclose(latents(runner, adapters={name: 1}), twice, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        (["a.soft_gate.lora_A.weight", "a.soft_gate.lora_B.weight"], ""),
        (["a.to_q.ia3_l"], "IA3"),
        (["a.to_q.oft_blocks"], "OFT"),
        (["a.lora_A", "a.lora_B"], ""),
        (["a.lora_A.weight", "a.lora_B.weight", "a.lora_B.bias"], ""),
        (["a.lora_A", "b.lora_B"], "without their other half"),
        (["a.lora_A.default.weight"], "without their other half, such as a.lora_A.default.weight"),
        (["a.lora_embedding_B"], "without their other half"),
    ],
)
def test_a_format_is_detected_by_whole_names_in_its_keys(keys: list[str], refused: str) -> None:
    if not refused:
        require_loadable(keys)
        return
    with pytest.raises(ModelUnavailable, match=refused):
        require_loadable(keys)


# -- the format of PEFT ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="scale 1"),
        pytest.param({"lora_alpha": 8}, id="alpha"),
        pytest.param({"lora_alpha": 8, "use_rslora": True}, id="rslora"),
        pytest.param({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}}, id="alpha of layers"),
        pytest.param({"lora_alpha": 8, "lora_bias": True}, id="bias"),
    ],
)
@pytest.mark.parametrize("family", ["stable_diffusion_3", "stable_diffusion_xl"])
def test_an_adapter_saved_by_peft_has_the_scale_of_its_configuration(
    *,
    family: str,
    config: dict[str, Any],
    shared_runner: Shared,
    model_folder: Folder,
    load: Load,
    tmp_path: Path,
) -> None:
    pipe = pipeline(shared_runner(family))
    part = "unet" if family == "stable_diffusion_xl" else "transformer"
    file = save_adapter(pipe, tmp_path / "diffusers")
    if config.get("lora_bias"):
        matrices = load_file(file).items()
        biases = {k.replace(".weight", ".bias"): w[:, 0] for k, w in matrices if ".lora_B." in k}
        save_file({**dict(matrices), **{k: b.contiguous() for k, b in biases.items()}}, file)
    folder = save_as_peft_does(file, tmp_path / "peft", part, **config)
    paths = {"ink": file, "same": folder, "file": folder / "adapter_model.safetensors"}
    runner = load(model_folder(family), adapters={n: str(path) for n, path in paths.items()})
    for weights in (1, 0.5):
        ink, same, by_file = (latents(runner, adapters={name: weights}) for name in paths)
        assert torch.allclose(ink, same, atol=1e-5)
        assert torch.equal(same, by_file)


def latents(runner: ModelRunner, **fields: Any) -> torch.Tensor:
    """Return the latents of a run: images of eight bits hide small differences."""
    seen: list[torch.Tensor] = []
    vae = pipeline(runner).vae
    hook = vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    pixels(runner, **fields)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "it is a LOHA adapter of PEFT; only LORA loads"),
        ({"peft_type": None}, "its adapter_config.json cannot be read"),
        ({"init_lora_weights": "pissa"}, "it was made with init_lora_weights=pissa, which changes"),
    ],
)
def test_an_adapter_of_peft_that_is_not_a_plain_lora_stops_the_start(
    *,
    config: dict[str, Any],
    message: str,
    plain: ModelRunner,
    model_folder: Folder,
    load: Load,
    tmp_path: Path,
) -> None:
    file = save_adapter(pipeline(plain), tmp_path / "diffusers")
    folder = save_as_peft_does(file, tmp_path / "peft", "transformer", **config)
    with pytest.raises(ModelUnavailable, match=f"^MODEL_ADAPTERS: ink: {message}"):
        load(model_folder("stable_diffusion_3"), adapters={"ink": str(folder)})


def test_a_dora_saved_by_peft_is_applied_as_a_dora(
    plain: ModelRunner, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    # diffusers reads the keys of PEFT, `lora_magnitude_vector`, and not those of kohya's scripts.
    pipe = pipeline(plain)
    file = save_adapter(pipe, tmp_path / "diffusers", layers=("to_q",))
    folder = save_as_peft_does(file, tmp_path / "peft", "transformer", use_dora=True)
    added = {}
    for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"):
        magnitude = 3 * pipe.transformer.get_submodule(layer).weight.detach().norm(dim=1)
        added[f"base_model.model.{layer}.lora_magnitude_vector".replace(".", "__")] = magnitude
    runner = load(model_folder("stable_diffusion_3"), adapters={"lora": str(file)})
    plain_lora = latents(runner, adapters={"lora": 1})
    add_weights(folder / "adapter_model.safetensors", **added)
    runner = load(model_folder("stable_diffusion_3"), adapters={"dora": str(folder)})
    assert not torch.allclose(latents(runner, adapters={"dora": 1}), plain_lora, atol=1e-4)
    assert pixels(runner) == pixels(plain)


def test_an_adapter_of_several_ranks_without_alphas_has_scale_1_in_each_layer(
    plain: ModelRunner, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    file = save_adapter(pipeline(plain), tmp_path / "one")
    mixed = save_adapter(pipeline(plain), tmp_path / "mixed")

    def widen(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Half of the layers have rank 4, whose other two rows and columns are zeros."""
        if "to_q" not in name:
            return name, weight
        return name, torch.cat([weight, torch.zeros_like(weight)], dim=int("lora_B" in name))

    change_weights(mixed, widen)
    paths = {"ink": str(file), "mixed": str(mixed)}
    runner = load(model_folder("stable_diffusion_3"), adapters=paths)
    ink, same = (latents(runner, adapters={name: 1}) for name in paths)
    assert torch.allclose(ink, same, atol=1e-5)


@pytest.mark.parametrize("alpha", [2.0, 8.0])
def test_an_adapter_of_kohya_scripts_has_the_scale_of_its_alphas(
    alpha: float, shared_runner: Shared, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    family = "stable_diffusion_xl"
    file = save_adapter(pipeline(shared_runner(family)), tmp_path, layers=("to_q", "to_v"))
    named = {}
    for key, weight in load_file(file).items():
        module, _, half = key.removeprefix("unet.").partition(".lora_")
        name = "lora_unet_" + module.replace(".", "_")
        down = half.startswith("A")
        named[f"{name}.lora_{'down' if down else 'up'}.weight"] = weight
        named[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(named, tmp_path / "kohya.safetensors")
    paths = {"ink": str(file), "kohya": str(tmp_path / "kohya.safetensors")}
    runner = load(model_folder(family), adapters=paths)
    ink = latents(runner, adapters={"ink": alpha / RANK})
    assert torch.allclose(latents(runner, adapters={"kohya": 1}), ink, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_an_adapter_with_another_dtype_is_loaded(
    dtype: torch.dtype, plain: ModelRunner, model_folder: Folder, load: Load, tmp_path: Path
) -> None:
    file = save_adapter(pipeline(plain), tmp_path)
    change_weights(file, lambda name, weight: (name, weight.to(dtype)))
    runner = load(model_folder("stable_diffusion_3"), adapters={"ink": str(file)})
    assert pixels(runner, adapters={"ink": 1}) != pixels(plain)
    assert pixels(runner) == pixels(plain)


def test_adapters_work_with_offloading(
    plain: ModelRunner,
    model_folder: Folder,
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = Placement(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(diffusion, "place", lambda _: cpu)  # stands for an accelerator
    monkeypatch.setattr(options, "validate_options", lambda *_: None)
    file = save_adapter(pipeline(plain), tmp_path)
    runner = load(model_folder("stable_diffusion_3"), offload="group", adapters={"ink": str(file)})
    assert pixels(runner, adapters={"ink": 1}) != pixels(plain)
    assert pixels(runner) == pixels(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "balanced"}, "MODEL_ADAPTERS, MODEL_DEVICE_MAP: "),
        ({"quantization": "torchao-int4"}, "MODEL_ADAPTERS, MODEL_QUANTIZATION: "),
    ],
)
def test_settings_that_are_incompatible_with_adapters_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelUnavailable, match=f"^{message}"):
        find_adapters(ModelConfig(adapters={"ink": "/nowhere"}, **options))


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("ink", "nothing", "ink: there is no such folder or .safetensors file"),
        ("ink", "pickle.bin", "ink: .bin files hold code and are not read: convert it to .safe"),
        ("ink", "one/../gone.ckpt", "ink: there is no such folder or .safetensors file"),
        ("ink", "none", "ink: its folder has 0 .safetensors files instead of one"),
        ("ink", "two", "ink: its folder has 2 .safetensors files instead of one"),
        ("../ink", "one", "'../ink' is no name"),
        ("a.b", "one", "'a.b' is no name"),
    ],
)
def test_a_missing_or_unsupported_adapter_file_stops_the_start(
    name: str, place: str, message: str, tmp_path: Path
) -> None:
    for folder, count in (("none", 0), ("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.safetensors").touch()
    (tmp_path / "pickle.bin").touch()
    with pytest.raises(ModelUnavailable) as refused:
        find_adapters(ModelConfig(adapters={name: str(tmp_path / place)}))
    assert str(refused.value).startswith(f"MODEL_ADAPTERS: {message}")
    assert str(refused.value).count(str(tmp_path)) <= 1


def test_a_folder_is_replaced_by_its_only_adapter_file(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.touch()
    (tmp_path / "README.md").touch()
    found = find_adapters(ModelConfig(adapters={"ink": str(tmp_path), "wash": str(file)}))
    assert found == {"ink": file, "wash": file}
