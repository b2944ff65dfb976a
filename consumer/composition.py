"""From settings to parts: the bus' topology, the object store, the runner."""

from consumer.artifacts import ObjectStoreArtifacts, store_config
from consumer.bus import Bus, Topology
from consumer.ports import Observer, Runner
from consumer.runners import ModelConfig, create_runner
from consumer.settings import Settings

# The worker counts tries and the server deliveries, with those that were given back on purpose. The
# server's number is only for what kills a worker before it can count.
DELIVERIES_PER_ATTEMPT = 10


def make_topology(settings: Settings, bus: Bus) -> Topology:
    """The streams and durables under the configured root."""
    return Topology(
        bus,
        settings.subjects,
        ack_wait=settings.consumer_ack_wait,
        max_ack_pending=settings.consumer_max_ack_pending,
        max_deliver=DELIVERIES_PER_ATTEMPT * settings.consumer_max_attempts,
        durable_name=settings.consumer_name,
    )


def make_artifacts(settings: Settings, observer: Observer) -> ObjectStoreArtifacts:
    """The object store with the configured credentials."""
    return ObjectStoreArtifacts(store_config(settings), observer=observer)


def make_runner(settings: Settings) -> Runner:
    """The configured model, not loaded yet.

    Raises:
        SettingsError: MODEL_TYPE is not set.
    """
    config = ModelConfig(
        model_id=settings.model_id,
        revision=settings.model_revision,
        device=settings.model_device,
        dtype=settings.model_dtype,
        offload=settings.model_offload,
        quantization=settings.model_quantization,
        compile=settings.model_compile,
        device_map=settings.model_device_map,
        warm_up=settings.model_warm_up,
        vae_tiling=settings.model_vae_tiling,
        vae_slicing=settings.model_vae_slicing,
        channels_last=settings.model_channels_last,
        attention=settings.model_attention,
        step_cache=settings.model_step_cache,
        defaults=settings.model_defaults,
        adapters=settings.model_adapters,
        safety_checker=settings.model_safety_checker,
        max_image_pixels=settings.model_max_image_pixels,
    )
    return create_runner(settings.task, config)
