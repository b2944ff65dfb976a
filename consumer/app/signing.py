"""Content Credentials from the settings: read the files, load the callback, try the signature."""

import asyncio
import pkgutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from PIL import Image

from consumer.media.codec import ImageCodec
from consumer.ports.media import EncodedImage, SigningFailed
from consumer.settings import Settings, SettingsError
from generation_contracts import TASKS

if TYPE_CHECKING:
    from consumer.media.content_credentials import ContentCredentials, SigningConfig

TRIAL_WITHIN = 60.0  # seconds; a time stamp authority or a callback may be slow

log = structlog.get_logger()


def make_credentials(settings: Settings) -> "ContentCredentials | None":
    """Return what signs the images of a worker; None if they are not signed.

    One small file is signed, without a network and without a call of the callback.

    Raises:
        SettingsError: The extra is not installed, or the chain, the key or the callback cannot be
            used; the text begins with the setting.
    """
    if settings.consumer_c2pa == "off" or TASKS[settings.task].output != "image":
        return None
    if find_spec("c2pa") is None:
        raise SettingsError("CONSUMER_C2PA: needs the extra `c2pa`")
    # Imported here because it loads a library of 23 MB, which most workers do not need.
    from consumer.media.content_credentials import (  # noqa: PLC0415
        ContentCredentials,
        WrongKey,
        check_config,
    )

    config = _config(settings)
    try:
        check_config(config, _trial_image())
        return ContentCredentials(config)
    except WrongKey as error:
        raise SettingsError(f"CONSUMER_C2PA_KEY, CONSUMER_C2PA_ALGORITHM: {error}") from None
    except SigningFailed as error:
        raise SettingsError(f"CONSUMER_C2PA_CHAIN: {error}") from None


async def try_signature(credentials: "ContentCredentials") -> str:
    """Sign one small file as the files of jobs are signed, and return the result in one line.

    Raises:
        SigningFailed: There is no valid signature, or none within `TRIAL_WITHIN`.
    """
    start = time.perf_counter()
    future = asyncio.wrap_future(credentials.submit(_trial_image(), {"model": "none"}))
    try:
        signed = await asyncio.wait_for(future, TRIAL_WITHIN)
    except TimeoutError:
        raise SigningFailed(f"no signature after {TRIAL_WITHIN:g} s") from None
    seconds = time.perf_counter() - start
    return f"{credentials.signer_of(signed)}; signed and verified a file in {seconds:.3f} s"


def _config(settings: Settings) -> "SigningConfig":
    from consumer.media.content_credentials import SigningConfig  # noqa: PLC0415 - the same

    key: Any
    if settings.consumer_c2pa_key is not None:
        key = _read("CONSUMER_C2PA_KEY", settings.consumer_c2pa_key)
    else:
        key = _callback(settings.consumer_c2pa_signer)
    if settings.consumer_c2pa_chain is None:
        raise AssertionError("the settings require a chain")
    return SigningConfig(
        chain=_read("CONSUMER_C2PA_CHAIN", settings.consumer_c2pa_chain),
        key=key,
        algorithm=settings.consumer_c2pa_algorithm,
        time_stamps=settings.consumer_c2pa_tsa,
    )


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path}: {error.strerror}") from None


def _callback(setting: str) -> Any:
    module, colon, name = setting.partition(":")
    if not colon or not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
        raise SettingsError("CONSUMER_C2PA_SIGNER: must be package.module:callable")
    try:
        found = pkgutil.resolve_name(setting)
    except (ModuleNotFoundError, AttributeError) as missing:
        reason = str(missing)
    except Exception as error:  # the import runs the operator's code
        log.exception("signer_not_imported")
        reason = type(error).__name__
    else:
        if callable(found):
            return found
        reason = "it is not callable"
    raise SettingsError(f"CONSUMER_C2PA_SIGNER: {setting} cannot be used: {reason}")


def _trial_image() -> EncodedImage:
    return ImageCodec().encode(Image.new("RGB", (16, 16)), "png", seed=0)
