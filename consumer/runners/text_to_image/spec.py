"""The runner of text_to_image, as far as it is known without diffusers."""

from consumer.ports.model import ModelDescription
from consumer.runners.task_settings import RunnerSpec, TrialInputs
from generation_contracts import TextToImageRequest

# The demonstration model knows this world. Any model can draw it.
_PROMPT = "a small red star on a white background at the top"
_STEPS = 2  # the first fills a step cache, the second reads it
_SEED = 0


def _smallest(description: ModelDescription) -> TrialInputs:
    default = description.defaults.get("num_inference_steps")
    steps = min(_STEPS, default) if isinstance(default, int) else _STEPS
    steps = max(steps, description.least_steps or 1)
    return TextToImageRequest(prompt="a gray square", num_inference_steps=steps, seed=_SEED), []


def _sample() -> TrialInputs:
    return TextToImageRequest(prompt=_PROMPT), []


SPEC = RunnerSpec(
    module="consumer.runners.text_to_image.diffusion",
    attention=(
        *("_flash_3", "_flash_varlen_3", "_native_cudnn", "_native_efficient", "_native_flash"),
        *("_native_math", "_native_npu", "_native_xla", "_sage_qk_int8_pv_fp16_cuda"),
        *("_sage_qk_int8_pv_fp16_triton", "_sage_qk_int8_pv_fp8_cuda"),
        *("_sage_qk_int8_pv_fp8_cuda_sm90", "flash", "flash_varlen", "flex", "native", "sage"),
        *("sage_varlen", "xformers"),
    ),
    settings=frozenset(
        {
            "vae_tiling",
            "vae_slicing",
            "channels_last",
            "step_cache",
            "adapters",
            "safety_checker",
            "safety_labels",
            "safety_threshold",
            "safety_policy",
        }
    ),
    is_pipeline=True,
    smallest=_smallest,
    sample=_sample,
    # The best settings of this model; the defaults of its family are for large models.
    demonstration={"num_inference_steps": 16, "guidance_scale": 2.5},
)
