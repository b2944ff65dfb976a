"""The settings of all commands, from the environment or a TOML file.

Wrong values raise `SettingsError` with one line for each of them, which names the setting.
"""

import json
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    HttpUrl,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from consumer.setting_names import is_service_address, suggestion, unknown_variables
from generation_contracts import ArtifactReference, Subjects, Task
from generation_contracts.base import pattern_message
from generation_contracts.queues import QueueInfo
from generation_contracts.servers import Servers, parse_servers
from generation_contracts.subjects import SUBJECT_PATTERN, QueueName, require_queue_name

_SPELLINGS = {str(task).replace("_to_", "2"): task for task in Task}
# Characters that editors and `kubectl create secret --from-file` add to a value: ASCII white space,
# and the byte order mark of files from Windows.
_AROUND = " \t\r\n\v\f\ufeff"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_SECRETS = ("nats_password", "s3_secret_key")  # may hold any printable character


class SettingsError(Exception):
    """Settings are wrong or missing; the text has one line for each, without a secret."""


def _clean(name: str, value: str, field: FieldInfo) -> str:
    """Return a value without surrounding white space, and a choice in its documented spelling.

    Raises:
        ValueError: The value is malformed; the text does not contain it.
    """
    value = value.strip(_AROUND)
    one_line = NoDecode not in field.metadata  # lists and maps may have several
    if one_line and _CONTROL.search(value):
        raise ValueError("contains a line end or another control character")
    if is_service_address(name, value):
        raise ValueError(
            "is the address of a Kubernetes Service: set it, or enableServiceLinks: false"
        )
    if name not in _SECRETS and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        # `docker run --env-file` keeps the quotes that a shell would remove.
        raise ValueError("is in quotes; write it without them")
    if get_origin(field.annotation) is Literal:
        choices: dict[str, str] = {choice.lower(): choice for choice in get_args(field.annotation)}
        return choices.get(value.lower(), value)
    return value


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(filter(None, (part.strip(_AROUND) for part in value)))
    return value


def _json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('must be JSON, for example {"num_inference_steps": 4}') from None


def _named(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
    if not all(name.strip() and folder.strip() for name, _, folder in pairs):
        raise ValueError("must be name=folder, comma-separated")
    return {name.strip(): folder.strip() for name, _, folder in pairs}


def _known_spelling(value: object) -> object:
    if isinstance(value, str):
        value = value.lower()
        return _SPELLINGS.get(value, value.replace("-", "_"))
    return value


def _http_url(value: str) -> str:
    url = HttpUrl(value)
    if url.username or url.password or url.query or url.fragment or url.path not in {None, "/"}:
        raise ValueError("must be http(s)://host[:port], without anything else")
    if url.port == 0:
        raise ValueError("the port must be 1 to 65535")
    # Signatures cover the header `Host`. Clients send it in lowercase ASCII, without the default
    # port of the scheme.
    return str(url).rstrip("/")


def _time_stamp_url(value: str) -> str:
    url = HttpUrl(value)
    if url.username or url.password or url.query or url.fragment:
        raise ValueError("must be http(s)://host[:port][/path], without anything else")
    return str(url)


def without_last_dot(endpoint: str) -> str:
    """Return the URL of an endpoint without a dot at the end of the host name.

    Some clients send this dot in the header `Host`, others do not.
    """
    return re.sub(r"\.(?=(:[0-9]+)?$)", "", endpoint)


def is_plain(key: str) -> bool:
    """Return whether an object key has no empty, `.` or `..` part.

    Stores resolve such parts, so the key could name another object. A store on a file system may
    treat a backslash as `/`, and a proxy may percent-decode a key twice.
    """
    parts, decoded = (
        [part.strip() for part in re.split(r"[/\\]", text)] for text in (key, unquote(key))
    )
    return "" not in parts and {".", ".."}.isdisjoint(parts + decoded)


def _places(values: tuple[str, ...]) -> tuple[str, ...]:
    places = tuple(value.removeprefix("s3://").strip("/") for value in values)
    for bucket, slash, prefix in (place.partition("/") for place in places):
        try:
            place = ArtifactReference(bucket=bucket, key=prefix if slash else "all")
        except ValidationError:
            raise ValueError("must be bucket or bucket/prefix, comma-separated") from None
        if not is_plain(place.key):
            raise ValueError("a prefix has an empty, `.` or `..` part")
    return places


def _hosts(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?", value):
            raise ValueError("must be host or host:port, in lowercase, comma-separated")
    return values


def _worker_name() -> str:
    # Part of events and of the CloudEvents source: letters, digits, `_` and `-` only.
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{socket.gethostname()}-{os.getpid()}")[-64:]


List = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)]
Places = Annotated[List, AfterValidator(_places)]
Url = Annotated[str, AfterValidator(_http_url)]
TimeStampUrl = Annotated[str, AfterValidator(_time_stamp_url)]
PublicUrl = Annotated[Url, AfterValidator(without_last_dot)]
Seconds = Annotated[float, Field(gt=0)]
Defaults = Annotated[dict[str, int | float | str], NoDecode, BeforeValidator(_json)]
Adapters = Annotated[dict[str, str], NoDecode, BeforeValidator(_named)]
DurableName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_-]{1,64}$"),
    pattern_message("must be 1-64 characters of A-Z a-z 0-9 _ -"),
]
InboxPrefix = Annotated[
    str,
    Field(pattern=SUBJECT_PATTERN, max_length=64),
    pattern_message("must be characters of A-Z a-z 0-9 _ - between dots"),
]
Bucket = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$"),
    pattern_message("must be 3-63 characters of a-z 0-9 . -, a letter or digit at both ends"),
]
Prefix = Annotated[
    str,
    BeforeValidator(lambda value: value.strip("/") if isinstance(value, str) else value),
    Field(pattern=r"^([A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*)?$"),
    pattern_message("must be names of A-Z a-z 0-9 _ - with slashes between them"),
]
AccessKey = Annotated[
    str, Field(pattern=r"^[!-~]*$"), pattern_message("must be printable ASCII, no spaces")
]


class Settings(BaseSettings):
    """The settings of all commands; the environment variable is the name in upper case."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    nats_url: str = Field(default="nats://127.0.0.1:4222", description="comma-separated")
    nats_user: str = Field(default="", description="replaces the user in NATS_URL")
    nats_password: SecretStr = SecretStr("")
    nats_creds: Path | None = Field(default=None, description="a .creds file")
    nats_nkey_seed: Path | None = Field(default=None, description="a file with an nkey seed")
    nats_ca: Path | None = Field(default=None, description="PEM: CA of the server certificate")
    nats_cert: Path | None = Field(default=None, description="PEM: the client's certificate")
    nats_key: Path | None = Field(default=None, description="PEM: the client's key")
    nats_inbox_prefix: InboxPrefix = Field(
        default="_INBOX", description="prefix of the user's inboxes"
    )
    nats_endpoints_creds: Path | None = Field(
        default=None, description="for the endpoint connection; unset: as the main connection"
    )
    nats_endpoints_nkey_seed: Path | None = Field(
        default=None, description="for the endpoint connection"
    )
    nats_endpoints_inbox_prefix: InboxPrefix | None = Field(
        default=None, description="for the endpoint connection; unset: NATS_INBOX_PREFIX"
    )
    nats_replicas: Annotated[int, Field(ge=1, le=5)] | None = Field(
        default=None,
        description="replicas of each stream, for `apply`; unset: 1 for new streams",
    )
    nats_stream_sizes: Literal["default", "small"] = Field(
        default="default", description="small: streams reserve a sixteenth of the storage"
    )

    model_type: Annotated[Task | None, BeforeValidator(_known_spelling)] = None
    model_id: str = Field(default="", description="hub id or directory; empty: demonstration model")
    model_revision: str | None = None
    model_device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model_offload: Literal["none", "model", "sequential", "group"] = "none"
    model_device_map: Literal["none", "balanced"] = Field(
        default="none", description="balanced: distribute the components over all GPUs"
    )
    model_quantization: Literal[
        "none", "bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8", "torchao-int4", "gguf"
    ] = "none"
    model_compile: bool = Field(default=False, description="compile the repeated blocks")
    model_warm_up: bool = Field(default=False, description="run once before ready")
    model_vae_tiling: bool = Field(default=False, description="decode images in tiles")
    model_vae_slicing: bool = Field(default=False, description="decode one image at a time")
    model_channels_last: bool = Field(default=False, description="memory format of convolutions")
    model_attention: str = Field(default="", description="attention backend; empty: torch's own")
    model_step_cache: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="threshold of the first-block cache; 0: off"
    )
    model_defaults: Defaults = Field(
        default={}, description="JSON: default values of request fields"
    )
    model_adapters: Adapters = Field(
        default={}, description="LoRA adapters: name=folder, comma-separated"
    )
    model_safety_checker: str = Field(
        default="", description="package.module:callable, folder or hub id; empty: no check"
    )
    model_safety_labels: List = Field(
        default=("nsfw",), description="a classifier's labels that flag an image"
    )
    model_safety_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    model_safety_policy: Literal["flag", "blank", "fail"] = "flag"
    model_max_image_pixels: Annotated[int, Field(ge=28 * 28)] = 1_200_000
    model_runner: str = Field(
        default="",
        description="`package.module:Class` of a runner; implies MODEL_TYPE=custom",
    )

    s3_endpoint: Url = "http://127.0.0.1:9000"
    s3_access_key: AccessKey = ""
    s3_secret_key: SecretStr = SecretStr("")
    s3_bucket: Bucket = "generation"
    s3_prefix: Prefix = ""
    s3_region: str = "us-east-1"
    s3_public_endpoint: PublicUrl | None = None
    s3_url_ttl: Annotated[int, Field(ge=1, le=7 * 86_400, description="seconds")] = 86_400
    s3_input_prefixes: Places = Field(
        default=(), description="bucket/prefix of inputs; empty: S3_BUCKET/S3_PREFIX"
    )

    consumer_subject_root: str = "generation"
    consumer_queue: QueueName | None = Field(default=None, description="default: the task")
    consumer_name: DurableName | None = Field(default=None, description="default: the queue")
    consumer_worker: DurableName = Field(default_factory=_worker_name)
    consumer_max_ack_pending: Annotated[int, Field(ge=1, le=10_000)] = 1
    consumer_jobs_in_flight: Annotated[int, Field(ge=1, le=1_000)] | None = Field(
        default=None, description="of this worker; default: three stages of CONSUMER_MAX_BATCH each"
    )
    consumer_max_batch: Annotated[int, Field(ge=1, le=256)] = Field(
        default=1, description="most requests in one run of the model"
    )
    consumer_batch_window_ms: Annotated[float, Field(ge=0, le=60_000)] = Field(
        default=10.0, description="how long a request that is ready waits for others"
    )
    consumer_ack_wait: Annotated[float, Field(ge=1, le=3_600)] = 60.0
    consumer_max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=3, description="of each request, for `apply`; workers read it from the durable"
    )
    consumer_retry_delay: Annotated[float, Field(ge=0, le=3_600)] = Field(
        default=2.0, description="seconds before the second attempt; doubles for each further one"
    )
    consumer_drain_grace: Seconds = 30.0
    consumer_stall_timeout: Seconds = 300.0
    consumer_probes_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    consumer_probes_host: str = "127.0.0.1"
    consumer_reply_prefixes: List = Field(
        default=(), description="prefixes of reply subjects; empty: _INBOX. and <root>.reply."
    )
    consumer_input_hosts: Annotated[List, AfterValidator(_hosts)] = Field(
        default=(), description="host or host:port of https inputs"
    )
    consumer_traces: bool = Field(
        default=False, description="export OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    consumer_prompt_in_pictures: bool = Field(
        default=False, description="write the prompt into the metadata of images"
    )
    consumer_ai_mark: bool = Field(
        default=True, description="write IPTC's digital source type into images"
    )
    consumer_c2pa: Literal["off", "best-effort", "required"] = Field(
        default="off", description="sign images with Content Credentials; needs the extra c2pa"
    )
    consumer_c2pa_chain: Path | None = Field(
        default=None, description="PEM: the signer's certificate and those that issued it"
    )
    consumer_c2pa_key: Path | None = Field(default=None, description="PEM, PKCS #8: its key")
    consumer_c2pa_signer: str = Field(
        default="", description="package.module:callable that signs, in place of a key"
    )
    consumer_c2pa_algorithm: Literal[
        "es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"
    ] = "es256"
    consumer_c2pa_tsa: TimeStampUrl | None = Field(
        default=None, description="URL of a time stamp authority (RFC 3161); unset: none"
    )
    consumer_max_input_bytes: Annotated[int, Field(gt=0)] = 20 * 2**20
    consumer_max_input_pixels: Annotated[int, Field(gt=0)] = 16_000_000

    gateway_host: str = Field(default="127.0.0.1", description="others need GATEWAY_KEYS")
    gateway_port: Annotated[int, Field(ge=1, le=65_535)] = 8080
    gateway_keys: Path | None = Field(
        default=None, description="key file of `consumer gateway keys`; unset: no key needed"
    )
    gateway_tls_cert: Path | None = Field(default=None, description="PEM; unset: plain HTTP")
    gateway_tls_key: Path | None = Field(default=None, description="PEM: its key")
    gateway_cors_origins: List = Field(
        default=(), description="origins of browser requests; empty: none"
    )
    gateway_input_prefixes: Places = Field(
        default=(),
        description="`bucket/prefix` of shared inputs, besides a tenant's own outputs",
    )
    gateway_max_body: Annotated[int, Field(ge=1_024, description="bytes of one request")] = (
        2 * 2**20  # twice the server's max_payload: JSON can escape what the queue has unescaped
    )
    gateway_bodies_bytes: Annotated[
        int, Field(ge=1_024, description="of the bodies of all requests in progress")
    ] = 128 * 2**20
    gateway_wait: Seconds = Field(
        default=600.0, description="seconds that a caller waits; also the deadline of its request"
    )
    gateway_events_kept: Seconds = Field(
        default=300.0, description="seconds in which a broken event stream can be resumed"
    )
    gateway_events_bytes: Annotated[int, Field(ge=2**20, description="of all events kept")] = (
        64 * 2**20
    )
    gateway_drain_grace: Seconds = 30.0

    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Drop each text of white space alone, which counts as unset."""
        return {
            name: value
            for name, value in values.items()
            if not isinstance(value, str) or not value or value.strip(_AROUND)
        }

    @field_validator("*", mode="before")
    @classmethod
    def _cleaned(cls, value: object, info: ValidationInfo) -> object:
        name = info.field_name
        if not isinstance(value, str) or not value or name is None:
            return value
        return _clean(name, value, cls.model_fields[name])

    @field_validator("nats_url")
    @classmethod
    def _usable_servers(cls, value: str) -> str:
        parse_servers(value)
        return value

    @field_validator("consumer_subject_root")
    @classmethod
    def _usable_root(cls, value: str) -> str:
        Subjects(value)
        return value

    @model_validator(mode="after")
    def _whole_pairs(self) -> Self:
        wrong = []
        if bool(self.nats_user) != bool(self.nats_password.get_secret_value()):
            wrong.append("NATS_USER and NATS_PASSWORD go together")
        if self.nats_user and self._nats_key_file:
            wrong.append("NATS_USER cannot be combined with NATS_CREDS or NATS_NKEY_SEED")
        if (self.nats_cert is None) != (self.nats_key is None):
            wrong.append("NATS_CERT and NATS_KEY go together")
        if (self.gateway_tls_cert is None) != (self.gateway_tls_key is None):
            wrong.append("GATEWAY_TLS_CERT and GATEWAY_TLS_KEY go together")
        if self.consumer_c2pa != "off":
            if self.consumer_c2pa_chain is None:
                wrong.append("CONSUMER_C2PA needs CONSUMER_C2PA_CHAIN")
            if (self.consumer_c2pa_key is None) != bool(self.consumer_c2pa_signer):
                wrong.append(
                    "CONSUMER_C2PA needs one of CONSUMER_C2PA_KEY and CONSUMER_C2PA_SIGNER"
                )
        if self.gateway_bodies_bytes < self.gateway_max_body:
            wrong.append("GATEWAY_BODIES_BYTES must be at least GATEWAY_MAX_BODY")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="before")
    @classmethod
    def _task_of_runner(cls, values: Any) -> Any:
        """A runner has one possible task."""
        if isinstance(values, dict) and values.get("model_runner"):
            return {"model_type": Task.CUSTOM, **values}
        return values

    @model_validator(mode="after")
    def _usable_queue(self) -> Self:
        if self.consumer_queue is not None and self.model_type is not None:
            try:
                require_queue_name(self.consumer_queue, self.model_type)
            except ValueError as error:
                raise ValueError(f"CONSUMER_QUEUE: {error}") from None
        return self

    @classmethod
    def load(cls, config: Path | None = None) -> Self:
        """Read the settings from the environment, and the remaining ones from a file.

        Args:
            config: TOML file; `nats_url = …` and `[nats] url = …` are equivalent.

        Raises:
            SettingsError: Settings are wrong, or a variable is a misspelt setting; the text has
                one line for each.
        """
        values = {} if config is None else _read(config)
        wrong = [
            _unknown(name) for name in cls.unknown_variables() if suggestion(name.upper(), _names())
        ]
        present = {name.lower() for name, value in os.environ.items() if value.strip(_AROUND)}
        from_file = {name: value for name, value in values.items() if name not in present}
        try:
            settings = cls(**from_file)
        except ValidationError as error:
            wrong += _lines(error)
        if wrong:
            raise SettingsError("\n".join(wrong))
        return settings

    @classmethod
    def unknown_variables(cls) -> list[str]:
        """Return the environment's variables with a prefix of the settings that are not settings.

        Variables that are known to belong to other programs are left out.
        """
        return unknown_variables(os.environ, _names())

    @property
    def task(self) -> Task:
        """The task of this daemon.

        Raises:
            SettingsError: MODEL_TYPE is not set.
        """
        if self.model_type is None:
            raise SettingsError(f"MODEL_TYPE: set it to one of {', '.join(Task)}")
        return self.model_type

    @property
    def queue(self) -> QueueInfo:
        """The queue of this daemon, with the model that its settings name.

        Raises:
            SettingsError: MODEL_TYPE is not set.
        """
        folder = Path(self.model_id).expanduser()
        is_folder = bool(self.model_id) and folder.is_dir()
        model = folder.resolve().name if is_folder else self.model_id
        name = self.consumer_queue or str(self.task)
        return QueueInfo(name, self.task, model or None, created_by=self.consumer_worker)

    @property
    def _nats_key_file(self) -> bool:
        """Whether a file has the credentials."""
        return self.nats_creds is not None or self.nats_nkey_seed is not None

    @property
    def nats_servers(self) -> Servers:
        """The servers, with the user of NATS_USER or, if unset, of NATS_URL.

        Without a user if NATS_CREDS or NATS_NKEY_SEED is set.
        """
        servers = parse_servers(self.nats_url)
        if self._nats_key_file:
            return Servers(servers.urls)
        if not self.nats_user:
            return servers
        password = self.nats_password.get_secret_value()
        return Servers(servers.urls, user=self.nats_user, password=password)

    @property
    def subjects(self) -> Subjects:
        """The subjects under the configured root."""
        return Subjects(self.consumer_subject_root)

    @property
    def endpoints(self) -> Self:
        """The settings of the endpoint connection, with its separate user if one is set."""
        changed: dict[str, Any] = {}
        if self.nats_endpoints_creds is not None or self.nats_endpoints_nkey_seed is not None:
            changed["nats_creds"] = self.nats_endpoints_creds
            changed["nats_nkey_seed"] = self.nats_endpoints_nkey_seed
            changed["nats_user"], changed["nats_password"] = "", SecretStr("")
        if self.nats_endpoints_inbox_prefix is not None:
            changed["nats_inbox_prefix"] = self.nats_endpoints_inbox_prefix
        return self.model_copy(update=changed)

    @property
    def input_prefixes(self) -> tuple[str, ...]:
        """`bucket/prefix` of all objects that may be inputs."""
        return self.s3_input_prefixes or (f"{self.s3_bucket}/{self.s3_prefix}".rstrip("/"),)

    @property
    def reply_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the reply subjects to which this worker may publish."""
        return self.consumer_reply_prefixes or ("_INBOX.", f"{self.consumer_subject_root}.reply.")

    def durable(self, queue: str) -> str:
        """Return the name of the durable consumer of a queue."""
        return self.consumer_name or str(queue)

    def shown(self, *, only_set: bool = False) -> dict[str, str]:
        """Return the settings by environment name, with secrets masked, for `consumer check`.

        Args:
            only_set: Leave out the settings that have their default because nothing sets them.
        """
        names = self.model_fields_set if only_set else type(self).model_fields.keys()
        return {name.upper(): _shown(name, value) for name, value in self if name in names}


def _read(config: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(config.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config}: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict) and name.lower() not in Settings.model_fields:
            flat.update({f"{name}_{key}".lower(): inner for key, inner in value.items()})
        else:
            flat[name.lower()] = value
    return flat


def _names() -> list[str]:
    return [name.upper() for name in Settings.model_fields]


def _unknown(name: str) -> str:
    close = suggestion(name.upper(), _names())
    return f"{name}: there is no such setting" + (f"; did you mean {close}?" if close else "")


def _lines(error: ValidationError) -> list[str]:
    """Return one line for each wrong setting."""
    lines: dict[str, list[str]] = {}  # of the first error of each setting: a union has several
    for each in error.errors(include_input=False, include_url=False, include_context=False):
        message = each["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in each["loc"]).upper()
        if each["type"] == "extra_forbidden":
            message = _unknown(place)
        elif place:
            message = f"{place}: {message}"
        # Without a place: combinations of settings, one line each.
        lines.setdefault(place.partition(".")[0], message.splitlines())
    return [line for of_setting in lines.values() for line in of_setting]


def _shown(name: str, value: object) -> str:
    if name == "nats_url":
        # A password may contain any separator. Masking too much is better than too little.
        servers = re.split(r",(?=\s*\w+://)", str(value))
        return ",".join(re.sub(r"^(\s*(?:\w+://)?).*@", r"\1***@", server) for server in servers)
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, dict):
        return ",".join(f"{key}={inner}" for key, inner in value.items())
    return "" if value is None else str(value)
