"""Settings: documented names, sources of values, and error messages."""

import json
import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from consumer.settings import Settings, SettingsError
from generation_contracts import Task
from generation_contracts.servers import Servers

SECRET = "k3y-that-is-never-shown"
# Every documented setting, with a value other than its default and its display.
VALUES = {
    "NATS_URL": ("nats://bus:4333", "nats://bus:4333"),
    "NATS_USER": ("worker", "worker"),
    "NATS_PASSWORD": (SECRET, "**********"),
    "NATS_CREDS": ("/run/worker.creds", "/run/worker.creds"),
    "NATS_NKEY_SEED": ("/run/seed", "/run/seed"),
    "NATS_ENDPOINTS_CREDS": ("/run/endpoints.creds", "/run/endpoints.creds"),
    "NATS_ENDPOINTS_NKEY_SEED": ("/run/endpoints-seed", "/run/endpoints-seed"),
    "NATS_ENDPOINTS_INBOX_PREFIX": ("_INBOX_endpoints", "_INBOX_endpoints"),
    "NATS_CA": ("/run/ca.pem", "/run/ca.pem"),
    "NATS_CERT": ("/run/cert.pem", "/run/cert.pem"),
    "NATS_KEY": ("/run/key.pem", "/run/key.pem"),
    "MODEL_TYPE": ("image_to_text", "image_to_text"),
    "MODEL_ID": ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    "MODEL_REVISION": ("abc", "abc"),
    "MODEL_DEVICE": ("cpu", "cpu"),
    "MODEL_DTYPE": ("bfloat16", "bfloat16"),
    "MODEL_OFFLOAD": ("model", "model"),
    "MODEL_DEVICE_MAP": ("balanced", "balanced"),
    "MODEL_QUANTIZATION": ("torchao-int8", "torchao-int8"),
    "MODEL_COMPILE": ("true", "True"),
    "MODEL_WARM_UP": ("true", "True"),
    "MODEL_VAE_TILING": ("true", "True"),
    "MODEL_VAE_SLICING": ("true", "True"),
    "MODEL_CHANNELS_LAST": ("true", "True"),
    "MODEL_ATTENTION": ("native", "native"),
    "MODEL_STEP_CACHE": ("0.05", "0.05"),
    "MODEL_DEFAULTS": ('{"guidance_scale": 3.5, "width": 64}', "guidance_scale=3.5,width=64"),
    "MODEL_ADAPTERS": (
        "pencil=/models/pencil, storm = /models/a=b ,",
        "pencil=/models/pencil,storm=/models/a=b",
    ),
    "MODEL_SAFETY_CHECKER": ("checks.pictures:safe", "checks.pictures:safe"),
    "MODEL_SAFETY_LABELS": ("nsfw, Gore ,", "nsfw,Gore"),
    "MODEL_SAFETY_THRESHOLD": ("0.8", "0.8"),
    "MODEL_SAFETY_POLICY": ("Blank", "blank"),
    "MODEL_MAX_IMAGE_PIXELS": ("500000", "500000"),
    "S3_ENDPOINT": ("https://s3.example:9000/", "https://s3.example:9000"),
    "S3_ACCESS_KEY": ("worker", "worker"),
    "S3_SECRET_KEY": (SECRET, "**********"),
    "S3_BUCKET": ("pictures", "pictures"),
    "S3_PREFIX": ("/team/a/", "team/a"),
    "S3_REGION": ("eu-west-1", "eu-west-1"),
    "S3_PUBLIC_ENDPOINT": ("https://pictures.example", "https://pictures.example"),
    "CONSUMER_SUBJECT_ROOT": ("team-a.generation", "team-a.generation"),
    "CONSUMER_NAME": ("batch", "batch"),
    "CONSUMER_MAX_ACK_PENDING": ("7", "7"),
    "CONSUMER_ACK_WAIT": ("30", "30.0"),
    "CONSUMER_MAX_ATTEMPTS": ("5", "5"),
    "CONSUMER_DRAIN_GRACE": ("0.5", "0.5"),
    "CONSUMER_STALL_TIMEOUT": ("12", "12.0"),
    "CONSUMER_PROBES_PORT": ("8080", "8080"),
    "CONSUMER_PROMPT_IN_PICTURES": ("true", "True"),
    "CONSUMER_REPLY_PREFIXES": ("_INBOX_a., reply.b. ,", "_INBOX_a.,reply.b."),
    "LOG_FORMAT": ("console", "console"),
    "LOG_LEVEL": ("debug", "DEBUG"),
}
# NATS credentials are given in one way only; each test of all settings takes both.
USER = ("NATS_USER", "NATS_PASSWORD")
KEY_FILES = ("NATS_CREDS", "NATS_NKEY_SEED")
COMBINATIONS = [
    {name: value for name, value in VALUES.items() if name not in left_out}
    for left_out in (USER, KEY_FILES)
]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all settings from the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


def refusal(config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as refused:
        Settings.load(config)
    text = str(refused.value)
    assert "\n" not in text
    return text


def toml(directory: Path, text: str) -> Path:
    path = directory / "consumer.toml"
    path.write_text(text)
    return path


# -- names and values -----------------------------------------------------------------------------


@pytest.mark.parametrize("values", COMBINATIONS, ids=["key files", "user"])
def test_documented_setting_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, tuple[str, str]]
) -> None:
    defaults = Settings.load().shown()
    for name, (value, _) in values.items():
        monkeypatch.setenv(name, value)
    shown = Settings.load().shown()
    assert {name: shown[name] for name in values} == {n: s for n, (_, s) in values.items()}
    assert [name for name in values if shown[name] == defaults[name]] == []


def test_defaults_match_the_documentation() -> None:
    settings = Settings.load()
    assert settings.model_type is None
    assert (settings.model_device, settings.model_dtype) == ("auto", "auto")
    assert (settings.s3_bucket, settings.consumer_subject_root) == ("generation", "generation")
    assert settings.consumer_max_ack_pending == 1
    assert settings.consumer_ack_wait == 60
    assert settings.consumer_max_attempts == 3
    assert settings.consumer_drain_grace == 30
    assert settings.consumer_stall_timeout == 300
    assert settings.consumer_probes_port == 0
    assert settings.reply_prefixes == ("_INBOX.", "generation.reply.")
    assert settings.input_prefixes == ("generation",)
    assert settings.durable(Task.TEXT_TO_IMAGE) == "text_to_image"
    assert settings.consumer_prompt_in_pictures is False


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_TYPE", "")
    monkeypatch.setenv("CONSUMER_ACK_WAIT", "")
    assert Settings.load().model_type is None
    assert Settings.load().consumer_ack_wait == 60


@pytest.mark.parametrize(
    ("spelling", "task"),
    [
        ("text_to_image", Task.TEXT_TO_IMAGE),
        ("image_to_text", Task.IMAGE_TO_TEXT),
        ("text2image", Task.TEXT_TO_IMAGE),
        ("image2text", Task.IMAGE_TO_TEXT),
        ("text-to-image", Task.TEXT_TO_IMAGE),
        ("image-to-text", Task.IMAGE_TO_TEXT),
    ],
)
def test_task_accepts_its_old_spellings(
    monkeypatch: pytest.MonkeyPatch, spelling: str, task: Task
) -> None:
    monkeypatch.setenv("MODEL_TYPE", spelling)
    assert Settings.load().task is task


def test_missing_task_is_reported_by_its_setting_name() -> None:
    settings = Settings.load()
    with pytest.raises(SettingsError, match=r"^MODEL_TYPE: "):
        _ = settings.task


def test_reply_prefixes_follow_the_subject_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_SUBJECT_ROOT", "team-a")
    settings = Settings.load()
    assert settings.reply_prefixes == ("_INBOX.", "team-a.reply.")
    assert settings.subjects.request(Task.TEXT_TO_IMAGE) == "team-a.request.text_to_image"


@pytest.mark.parametrize(
    ("changed", "credentials"),
    [
        ({}, ("w.creds", "w.seed", "_INBOX_w")),
        ({"NATS_ENDPOINTS_INBOX_PREFIX": "_INBOX_e"}, ("w.creds", "w.seed", "_INBOX_e")),
        ({"NATS_ENDPOINTS_NKEY_SEED": "e.seed"}, ("None", "e.seed", "_INBOX_w")),
        ({"NATS_ENDPOINTS_CREDS": "e.creds"}, ("e.creds", "None", "_INBOX_w")),
    ],
)
def test_endpoints_use_the_user_of_the_worker_by_default(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], credentials: tuple[str, str, str]
) -> None:
    worker = {"NATS_CREDS": "w.creds", "NATS_NKEY_SEED": "w.seed", "NATS_INBOX_PREFIX": "_INBOX_w"}
    for name, value in {**worker, **changed}.items():
        monkeypatch.setenv(name, value)
    endpoints = Settings.load().endpoints
    used = (endpoints.nats_creds, endpoints.nats_nkey_seed, endpoints.nats_inbox_prefix)
    assert tuple(map(str, used)) == credentials


def test_inputs_are_readable_only_below_the_prefix_of_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("S3_PREFIX", "team/a")
    assert Settings.load().input_prefixes == ("generation/team/a",)
    monkeypatch.setenv(
        "S3_INPUT_PREFIXES", "uploads/x, /Old_Bucket/ ,\ns3://pictures/Zürich und Genf/"
    )
    assert Settings.load().input_prefixes == ("uploads/x", "Old_Bucket", "pictures/Zürich und Genf")


@pytest.mark.parametrize(
    ("value", "endpoint"),
    [
        ("https://S3.Example:443/", "https://s3.example"),
        ("http://s3.example:443", "http://s3.example:443"),
        ("http://[2001:DB8::1]:80", "http://[2001:db8::1]"),
        ("http://minio_1:9000", "http://minio_1:9000"),
        ("http://minio.default.svc.cluster.local.:9000", None),
    ],
)
def test_endpoints_are_normalised_to_the_form_of_the_clients(
    monkeypatch: pytest.MonkeyPatch, value: str, endpoint: str | None
) -> None:
    monkeypatch.setenv("S3_ENDPOINT", value)
    assert Settings.load().s3_endpoint == (endpoint or value)


# What a file, a secret or a person leaves around a value.
AROUND = ["{}\n", "{}\r\n", " {} ", "\ufeff{}\r\n", "\t{}\n\n"]


@pytest.mark.parametrize("around", AROUND, ids=ascii)
@pytest.mark.parametrize("values", COMBINATIONS, ids=["key files", "user"])
def test_white_space_around_a_value_is_stripped(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    values: dict[str, tuple[str, str]],
    around: str,
) -> None:
    for name, (value, _) in values.items():
        monkeypatch.setenv(name, around.format(value))
    settings = Settings.load()
    shown = settings.shown()
    assert {name: shown[name] for name in values} == {n: s for n, (_, s) in values.items()}
    secrets = [settings.s3_secret_key, *([settings.nats_password] if settings.nats_user else [])]
    assert all(secret == SecretStr(SECRET) for secret in secrets)
    file = toml(tmp_path, f"s3_region = {json.dumps(around.format('here'))}")
    monkeypatch.setenv("S3_REGION", around.format(""))  # white space alone is no value
    assert Settings.load(file).s3_region == "here"


def test_setting_names_are_case_insensitive_and_secrets_keep_their_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {
        "MODEL_TYPE": "TEXT_TO_IMAGE",
        "MODEL_DEVICE": "CUDA",
        "MODEL_QUANTIZATION": "GGUF",
        "MODEL_COMPILE": "TRUE",
        "LOG_FORMAT": "Console",
        "S3_SECRET_KEY": '"in quotes"',
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert settings.task is Task.TEXT_TO_IMAGE
    assert (settings.model_device, settings.model_quantization) == ("cuda", "gguf")
    assert settings.model_compile
    assert settings.log_format == "console"
    assert settings.s3_secret_key.get_secret_value() == '"in quotes"'


def test_user_and_password_require_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_USER", "worker")
    assert refusal() == "NATS_USER and NATS_PASSWORD go together"


@pytest.mark.parametrize("name", KEY_FILES)
def test_only_one_form_of_nats_credentials_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for user in USER:
        monkeypatch.setenv(user, SECRET)
    monkeypatch.setenv(name, "/run/credentials")
    assert refusal() == "NATS_USER cannot be combined with NATS_CREDS or NATS_NKEY_SEED"


@pytest.mark.parametrize("name", KEY_FILES)
@pytest.mark.parametrize("user", ["user:password", "token"])
def test_credentials_file_replaces_the_user_in_the_url(
    monkeypatch: pytest.MonkeyPatch, name: str, user: str
) -> None:
    monkeypatch.setenv("NATS_URL", f"nats://{user}@bus")
    assert Settings.load().nats_servers.credentials
    monkeypatch.setenv(name, "/run/credentials")
    assert Settings.load().nats_servers == Servers(("nats://bus",))


@pytest.mark.parametrize("name", ["NATS_ENDPOINTS_CREDS", "NATS_ENDPOINTS_NKEY_SEED"])
def test_endpoints_with_a_credentials_file_do_not_use_the_user_of_the_worker(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for user in USER:
        monkeypatch.setenv(user, SECRET)
    assert Settings.load().endpoints.nats_servers.credentials
    monkeypatch.setenv(name, "/run/credentials")
    endpoints = Settings.load().endpoints
    assert endpoints.nats_servers.credentials == {}
    assert (endpoints.nats_user, endpoints.nats_password) == ("", SecretStr(""))


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        """
        nats_url = "nats://bus:1"
        consumer_ack_wait = 30
        model_type = "text2image"
        model_defaults = '{"width": 64}'
        model_adapters = "pencil=/models/pencil"
        consumer_reply_prefixes = ["a.", "b."]
        """,
        """
        [nats]
        url = "nats://bus:1"
        [consumer]
        ack_wait = 30
        reply_prefixes = "a.,b."
        [model]
        type = "text2image"
        defaults = { width = 64 }
        adapters = { pencil = "/models/pencil" }
        """,
    ],
    ids=["flat", "in sections"],
)
def test_file_may_be_flat_or_in_sections(tmp_path: Path, text: str) -> None:
    file = toml(tmp_path, "")
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    settings = Settings.load(file)
    assert (settings.nats_url, settings.consumer_ack_wait) == ("nats://bus:1", 30)
    assert settings.task is Task.TEXT_TO_IMAGE
    assert settings.reply_prefixes == ("a.", "b.")
    assert settings.model_defaults == {"width": 64}
    assert settings.model_adapters == {"pencil": "/models/pencil"}


def test_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toml(tmp_path, 's3_bucket = "from-file"\n[nats]\nurl = "nats://file:1"')
    monkeypatch.setenv("NATS_URL", "nats://environment:1")
    settings = Settings.load(config)
    assert settings.nats_url == "nats://environment:1"
    assert settings.s3_bucket == "from-file"
    monkeypatch.setenv("NATS_URL", "")
    assert Settings.load(config).nats_url == "nats://file:1"


def test_environment_overrides_the_file_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nats_url", "nats://environment:1")
    assert Settings.load(toml(tmp_path, 'nats_url = "nats://file:1"')).nats_url == (
        "nats://environment:1"
    )


def test_invalid_value_in_the_file_is_ignored_if_the_environment_sets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    assert Settings.load(toml(tmp_path, 'log_level = "LOUD"')).log_level == "INFO"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nats_uri = "x"', "NATS_URI: there is no such setting"),
        ('model_typ = "x"', "MODEL_TYP: there is no such setting; did you mean MODEL_TYPE?"),
        ('[nats]\nuri = "x"', "NATS_URI: there is no such setting"),
        ("[consumer.reply]\nprefixes = []", "CONSUMER_REPLY: there is no such setting"),
        ("nats_url = ", "consumer.toml: "),
        ("model_defaults = 4", "MODEL_DEFAULTS: "),
        ("\xff", "consumer.toml: "),
        ('consumer_ack_wait = "soon"', "CONSUMER_ACK_WAIT: "),
    ],
)
def test_unusable_file_is_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "consumer.toml"
    path.write_bytes(text.encode("latin-1"))
    assert message in refusal(path)


def test_missing_file_is_reported_in_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").endswith("none.toml: No such file or directory")


# -- wrong values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NATS_URL", f"nats://user:{SECRET}/{SECRET}@bus"),
        ("NATS_URL", f"nats://c:{SECRET},{SECRET}@b2"),
        ("NATS_URL", f"nats://a:{SECRET}@b1,nats://c:{SECRET}@b2"),
        ("NATS_URL", f"nats://a:1#{SECRET}@b1"),
        ("NATS_URL", f"nats://b1,wss://a:{SECRET}@b2"),
        ("NATS_PASSWORD", f"{SECRET}\n{SECRET}"),
        ("NATS_INBOX_PREFIX", "a..b"),
        ("MODEL_TYPE", "text2video"),
        ("MODEL_DEVICE", "tpu"),
        ("MODEL_DTYPE", "float8"),
        ("MODEL_OFFLOAD", "all"),
        ("MODEL_QUANTIZATION", "int8"),
        ("MODEL_COMPILE", "perhaps"),
        ("MODEL_STEP_CACHE", "1"),
        ("MODEL_DEFAULTS", "width=64"),
        ("MODEL_DEFAULTS", "[64]"),
        ("MODEL_ADAPTERS", "pencil"),
        ("MODEL_ADAPTERS", "=/models/pencil"),
        ("MODEL_ADAPTERS", "pencil="),
        ("MODEL_MAX_IMAGE_PIXELS", "10"),
        ("S3_ENDPOINT", "s3.example:9000"),
        ("S3_ENDPOINT", "ftp://s3.example"),
        ("S3_ENDPOINT", "http://s3.example/bucket"),
        ("S3_ENDPOINT", "http://s3.example?x=1"),
        ("S3_ENDPOINT", "http://s3.example:0"),
        ("S3_ENDPOINT", f"http://user:{SECRET}@s3.example"),
        ("S3_PUBLIC_ENDPOINT", "pictures"),
        ("S3_ENDPOINT", '"http://s3.example"'),
        ("S3_ACCESS_KEY", f"{SECRET} {SECRET}"),
        ("S3_ACCESS_KEY", f"{SECRET}\r\n{SECRET}"),
        ("S3_ACCESS_KEY", f"'{SECRET}'"),
        ("S3_ACCESS_KEY", f"{SECRET}\u00a0"),
        ("S3_SECRET_KEY", f"{SECRET}\n{SECRET}"),
        ("S3_BUCKET", "Generation"),
        ("S3_BUCKET", "a"),
        ("S3_PREFIX", "team//a"),
        ("S3_PREFIX", "../team"),
        ("S3_INPUT_PREFIXES", "uploads/../x"),
        ("S3_INPUT_PREFIXES", "uploads/a/%2e%2e%20/x"),
        ("S3_INPUT_PREFIXES", "uploads/a\\..\\x"),
        ("GATEWAY_INPUT_PREFIXES", "uploads/a%2F../x"),
        ("S3_INPUT_PREFIXES", "u/x"),
        ("GATEWAY_INPUT_PREFIXES", "https://uploads/x"),
        ("S3_URL_TTL", "604801"),
        ("CONSUMER_SUBJECT_ROOT", "a.*"),
        ("CONSUMER_SUBJECT_ROOT", "$JS.API"),
        ("CONSUMER_NAME", "a.b"),
        ("CONSUMER_WORKER", "a b"),
        ("CONSUMER_MAX_ACK_PENDING", "0"),
        ("CONSUMER_ACK_WAIT", "0.5"),
        ("CONSUMER_ACK_WAIT", "nan"),
        ("CONSUMER_MAX_ATTEMPTS", "0"),
        ("CONSUMER_DRAIN_GRACE", "0"),
        ("CONSUMER_DRAIN_GRACE", "-1"),
        ("CONSUMER_STALL_TIMEOUT", "soon"),
        ("CONSUMER_PROBES_PORT", "65536"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_invalid_value_is_reported_in_one_line_with_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    text = refusal()
    assert text.startswith(f"{name}: ")
    assert SECRET not in text
    assert "pattern" not in text


def test_certificate_and_key_require_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_CERT", "/run/cert.pem")
    assert refusal() == "NATS_CERT and NATS_KEY go together"


@pytest.mark.parametrize("mode", ["best-effort", "required"])
@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {},
            [
                "CONSUMER_C2PA needs CONSUMER_C2PA_CHAIN",
                "CONSUMER_C2PA needs one of CONSUMER_C2PA_KEY and CONSUMER_C2PA_SIGNER",
            ],
        ),
        ({"KEY": "/run/key.pem"}, ["CONSUMER_C2PA needs CONSUMER_C2PA_CHAIN"]),
        (
            {"CHAIN": "/run/chain.pem", "KEY": "/run/key.pem", "SIGNER": "a:b"},
            ["CONSUMER_C2PA needs one of CONSUMER_C2PA_KEY and CONSUMER_C2PA_SIGNER"],
        ),
    ],
    ids=["nothing", "no chain", "a key and a callback"],
)
def test_signatures_need_a_chain_and_one_key(
    mode: str, given: dict[str, str], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"CONSUMER_C2PA_{name}", value)
    Settings.load()  # without signatures, the files are not needed
    monkeypatch.setenv("CONSUMER_C2PA", mode)
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    assert str(refused.value).splitlines() == lines


@pytest.mark.parametrize(
    "address",
    ["ftp://tsa", "tsa", "http://user:secret@tsa", "http://tsa/?key=secret", "http://tsa/#a"],
)
def test_address_of_time_stamps_has_no_secret(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUMER_C2PA_TSA", "http://tsa.example/rfc3161")
    assert Settings.load().consumer_c2pa_tsa == "http://tsa.example/rfc3161"
    monkeypatch.setenv("CONSUMER_C2PA_TSA", address)
    text = refusal()
    assert text.startswith("CONSUMER_C2PA_TSA: ")
    assert "secret" not in text


def test_body_limit_must_not_exceed_the_limit_of_all_bodies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_BODIES_BYTES", "1024")
    assert refusal() == "GATEWAY_BODIES_BYTES must be at least GATEWAY_MAX_BODY"


def test_secret_value_is_never_reported(tmp_path: Path) -> None:
    text = refusal(toml(tmp_path, f's3_secret_key = ["{SECRET}"]'))
    assert text.startswith("S3_SECRET_KEY: ")
    assert SECRET not in text
    with pytest.raises(ValidationError) as raised:
        Settings(s3_secret_key=[SECRET])
    assert SECRET not in str(raised.value)


def test_each_wrong_setting_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "CONSUMER_MAX_BACTH": "4",
        "MODEL_DEVICE": "tpu",
        "MODEL_DEFAULTS": '{"width": [64]}',
        "S3_BUCKET": "'quoted'",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    lines = str(refused.value).splitlines()
    assert [re.split(r"[:.]", line)[0] for line in lines] == sorted(wrong, key=list(wrong).index)


def test_each_wrong_combination_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_CERT", "/run/cert.pem")
    monkeypatch.setenv("GATEWAY_TLS_KEY", "/run/key.pem")
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    assert str(refused.value).splitlines() == [
        "NATS_CERT and NATS_KEY go together",
        "GATEWAY_TLS_CERT and GATEWAY_TLS_KEY go together",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CONSUMER_MAX_BACTH", "CONSUMER_MAX_BATCH"),
        ("MODEL_TYP", "MODEL_TYPE"),
        ("model_idd", "MODEL_ID"),
        ("S3_BUKET", "S3_BUCKET"),
        ("S3_ENDPOINT_URL", "S3_ENDPOINT"),
        ("NATS_CRED", "NATS_CREDS"),
        ("GATEWAY_PROT", "GATEWAY_PORT"),
        ("GATEWAY_TLS_CRT", "GATEWAY_TLS_CERT"),
        ("MODEL_PATH", None),
        ("CONSUMER_GROUP", None),
        ("S3_BUCKET_NAME", None),
    ],
)
def test_misspelt_variable_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str | None
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert Settings.unknown_variables() == [name]
    if meant is None:
        Settings.load()
    else:
        assert refusal() == f"{name}: there is no such setting; did you mean {meant}?"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NATS_NKEY", "seed"),  # near NATS_KEY
        ("NATS_CONTEXT", "local"),
        ("GATEWAY_KEY", "none"),  # near GATEWAY_KEYS
        ("S3_ACCESS_KEY_ID", "key"),  # near S3_ACCESS_KEY
        ("NATS_PORT", "tcp://10.0.0.1:4222"),
        ("NATS_SERVICE_HOST", "10.0.0.1"),
        ("NATS_SERVICE_PORT", "4222"),
        ("NATS_SERVICE_PORT_CLIENT", "4222"),
        ("NATS_PORT_4222_TCP", "tcp://10.0.0.1:4222"),
        ("NATS_PORT_4222_TCP_ADDR", "10.0.0.1"),
        ("CONSUMER_PROBE_PORT", "tcp://10.0.0.1:80"),  # near CONSUMER_PROBES_PORT
    ],
)
def test_variables_of_other_programs_are_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    Settings.load()
    assert Settings.unknown_variables() == []


@pytest.mark.parametrize("name", ["GATEWAY_PORT", "CONSUMER_PROBES_PORT"])
def test_a_kubernetes_service_address_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "tcp://10.0.0.1:8080")
    assert refusal().startswith(f"{name}: is the address of a Kubernetes Service")


# -- display of settings --------------------------------------------------------------------------


def test_secret_key_is_hidden_in_all_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_SECRET_KEY", SECRET)
    settings = Settings.load()
    assert settings.s3_secret_key == SecretStr(SECRET)
    assert SECRET not in " ".join(settings.shown().values())
    assert SECRET not in repr(settings)
    monkeypatch.delenv("S3_SECRET_KEY")
    assert Settings.load().shown()["S3_SECRET_KEY"] == ""


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"nats://user:{SECRET}@bus:4222", "nats://***@bus:4222"),
        (f"nats://{SECRET}@bus:4222", "nats://***@bus:4222"),
        (f"nats://user:{SECRET}@{SECRET}@bus", "nats://***@bus"),
        (f"user:{SECRET}@bus:4222", "***@bus:4222"),
        (f"nats://a:{SECRET}@b1,tls://a:{SECRET}@b2", "nats://***@b1,tls://***@b2"),
        (f"nats://b1:4222, nats://c:{SECRET}@b2", "nats://b1:4222, nats://***@b2"),
        (f"nats://b1:4222,c:{SECRET}@b2", "nats://***@b2"),
        ("nats://b1:4222,nats://b2:4222", "nats://b1:4222,nats://b2:4222"),
    ],
)
def test_credentials_in_the_nats_url_are_hidden(
    monkeypatch: pytest.MonkeyPatch, url: str, shown: str
) -> None:
    monkeypatch.setenv("NATS_URL", url)
    assert Settings.load().shown()["NATS_URL"] == shown


def test_default_worker_name_is_valid_in_events() -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", Settings.load().consumer_worker)


def test_tables_and_text_give_equal_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = toml(
        tmp_path, 'model_defaults = {num_inference_steps = 4}\nmodel_adapters = {ink = "/m/ink"}'
    )
    from_file = Settings.load(tables)
    monkeypatch.setenv("MODEL_DEFAULTS", '{"num_inference_steps": 4}')
    monkeypatch.setenv("MODEL_ADAPTERS", "ink=/m/ink, ")
    from_environment = Settings.load()
    for settings in (from_file, from_environment):
        assert settings.model_defaults == {"num_inference_steps": 4}
        assert settings.model_adapters == {"ink": "/m/ink"}
    assert from_environment.shown()["MODEL_ADAPTERS"] == "ink=/m/ink"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODEL_DEFAULTS", "steps=4", "must be JSON"),
        ("MODEL_ADAPTERS", "ink", "must be name=folder"),
        ("MODEL_ADAPTERS", "=/m/ink", "must be name=folder"),
        ("MODEL_QUANTIZATION", "int3", "torchao-int8"),
        ("MODEL_STEP_CACHE", "1", "less than 1"),
    ],
)
def test_invalid_model_setting_is_reported(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{name}: .*{message}"):
        Settings.load()
