"""The file of API keys, and its use by a running gateway."""

import json
import multiprocessing
import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest
from structlog.testing import capture_logs

from consumer.gateway.errors import ApiError
from consumer.gateway.keys import OPEN_CALLER, KeyFile, Keys, KeysUnusable, KeyUnknown
from consumer.gateway.tenants import Bounds
from consumer.settings import SettingsError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def refusal(keys: Keys, authorization: str | None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        keys.caller(authorization)
    return caught.value


def test_a_key_identifies_its_tenant_and_bounds(path: Path) -> None:
    new = KeyFile(path).add("acme", Bounds(waiting=3, pixels=512 * 512))
    caller = Keys(path).caller(bearer(new.text))
    assert caller.tenant.name == "acme"
    assert caller.key_id == new.id
    assert caller.bounds == Bounds(waiting=3, pixels=512 * 512)
    assert len(caller.tenant.secret) == 32


def test_the_file_contains_no_key_and_is_private(path: Path) -> None:
    new = KeyFile(path).add("acme", Bounds())
    text = path.read_text()
    assert new.text not in text
    assert new.text.rpartition("_")[2] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(text)["version"] == 1


def test_a_key_has_a_prefix_and_256_random_bits(path: Path) -> None:
    keys = {KeyFile(path).add("acme", Bounds()).text for _ in range(3)}
    assert len(keys) == 3
    assert all(key.startswith("gk_") and len(key) == 3 + 8 + 1 + 43 for key in keys)


def test_all_keys_of_a_tenant_have_the_same_jobs(path: Path) -> None:
    """Rotation: add the new key, distribute it, revoke the old one."""
    old = KeyFile(path).add("acme", Bounds())
    new = KeyFile(path).add("acme", Bounds())
    other = KeyFile(path).add("other", Bounds())
    keys = Keys(path)
    tenant = keys.caller(bearer(old.text)).tenant
    assert keys.caller(bearer(new.text)).tenant == tenant
    assert keys.caller(bearer(other.text)).tenant.tag != tenant.tag
    KeyFile(path).revoke(old.id)
    assert refusal(keys, bearer(old.text)).status == 401
    assert keys.caller(bearer(new.text)).tenant == tenant


def test_a_tenant_remains_after_its_last_key_is_revoked(path: Path) -> None:
    first = KeyFile(path).add("acme", Bounds())
    tenant = Keys(path).caller(bearer(first.text)).tenant
    KeyFile(path).revoke(first.text)  # the complete key, as found in a leak
    second = KeyFile(path).add("acme", Bounds())
    assert Keys(path).caller(bearer(second.text)).tenant == tenant


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer gk_",
        "Bearer gk_aaaaaaaa_" + "A" * 43,
        "Bearer \xff\xfe",
        "Bearer " + "x" * 100_000,
        "Basic Z2s6",
    ],
)
def test_an_invalid_authorization_is_refused(path: Path, authorization: str | None) -> None:
    KeyFile(path).add("acme", Bounds())
    error = refusal(Keys(path), authorization)
    assert error.status == 401
    assert error.headers["www-authenticate"] == "Bearer"
    assert error.headers["x-should-retry"] == "false"
    assert error.body["error"]["type"] == "authentication_error"


def test_a_key_with_one_wrong_character_is_refused(path: Path) -> None:
    key = KeyFile(path).add("acme", Bounds()).text
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert refusal(Keys(path), bearer(wrong)).status == 401


def test_the_authorization_scheme_is_case_insensitive(path: Path) -> None:
    key = KeyFile(path).add("acme", Bounds()).text
    assert Keys(path).caller(f"bearer {key}").tenant.name == "acme"


def test_without_a_file_all_callers_are_the_open_tenant() -> None:
    keys = Keys(None)
    assert keys.open
    assert keys.caller(None) is OPEN_CALLER
    assert keys.caller("Bearer anything") is OPEN_CALLER


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "object"),
        ('{"version": 2}', "version"),
        ('{"keys": {"aaaaaaaa": {"tenant": "acme"}}}', "keys.aaaaaaaa"),
        ('{"unknown": 1}', "unknown"),
        (
            json.dumps(
                {
                    "keys": {
                        "aaaaaaaa": {
                            "tenant": "gone",
                            "sha256": "0" * 64,
                            "created": "2030-01-01T00:00:00Z",
                        }
                    }
                }
            ),
            "aaaaaaaa",
        ),
        (
            json.dumps(
                {"tenants": {name: {"tag": "aaaaaaaa", "secret": "0" * 64} for name in ("a", "b")}}
            ),
            "tag",
        ),
        (json.dumps({"tenants": {"a": {"tag": "open0000", "secret": "0" * 64}}}), "tag"),
    ],
)
def test_a_damaged_file_stops_the_start_with_a_single_line(
    path: Path, content: str, part: str
) -> None:
    path.write_text(content)
    with pytest.raises(KeysUnusable) as caught:
        Keys(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(KeysUnusable):
        KeyFile(path).add("acme", Bounds())
    assert path.read_text() == content  # a damaged file is not overwritten


def test_a_file_with_windows_line_ends_and_a_bom_is_read(path: Path) -> None:
    key = KeyFile(path).add("acme", Bounds())
    saved = path.read_text().replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + saved.encode())
    assert KeyFile(path).revoke(key.id) == key.id


def test_a_damaged_file_is_described_without_its_secrets(path: Path) -> None:
    secret = "c0ffee" * 10
    path.write_text(json.dumps({"tenants": {"acme": {"tag": "aaaaaaaa", "secret": secret}}}))
    with pytest.raises(KeysUnusable) as caught:
        Keys(path)
    assert secret not in str(caught.value)


def test_a_missing_file_stops_the_start(path: Path) -> None:
    with pytest.raises(KeysUnusable, match="No such file"):
        Keys(path)


def test_a_world_writable_file_is_refused(path: Path) -> None:
    KeyFile(path).add("acme", Bounds())
    path.chmod(0o666)
    with pytest.raises(KeysUnusable, match="may write"):
        Keys(path)


def test_a_file_that_becomes_unusable_disables_every_key(path: Path) -> None:
    """The change may be a revocation, so the gateway accepts no key until it can read the file."""
    key = KeyFile(path).add("acme", Bounds()).text
    keys = Keys(path)
    good = path.read_text()
    path.write_text("{")
    with capture_logs() as lines:
        for _ in range(3):
            error = refusal(keys, bearer(key))
    assert error.status == 503
    assert error.headers["x-should-retry"] == "true"
    assert str(path) not in error.message
    assert [line["event"] for line in lines] == ["gateway_keys_unusable"]
    assert not keys.usable
    path.unlink()
    assert refusal(keys, bearer(key)).status == 503
    path.write_text(good)
    assert keys.caller(bearer(key)).tenant.name == "acme"
    assert keys.usable


def test_a_repaired_file_is_read_without_a_request(path: Path) -> None:
    """A gateway that is not ready receives no requests, so its probes read the file."""
    key = KeyFile(path).add("acme", Bounds()).text
    keys = Keys(path)
    good = path.read_text()
    path.write_text("{")
    keys.reload()
    assert not keys.usable
    path.write_text(good)
    keys.reload()
    assert keys.usable
    assert keys.caller(bearer(key)).tenant.name == "acme"


def test_a_failed_read_of_the_file_is_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = KeyFile(path).add("acme", Bounds()).text
    keys = Keys(path)
    KeyFile(path).add("acme", Bounds())

    def too_many_open_files(_: KeyFile) -> NoReturn:
        raise KeysUnusable("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(KeyFile, "read", too_many_open_files)
        assert refusal(keys, bearer(key)).status == 503
    assert keys.caller(bearer(key)).tenant.name == "acme"


def test_a_running_gateway_reloads_a_changed_file(path: Path) -> None:
    first = KeyFile(path).add("acme", Bounds())
    keys = Keys(path)
    second = KeyFile(path).add("acme", Bounds(steps=4))
    assert keys.caller(bearer(second.text)).bounds.steps == 4
    KeyFile(path).revoke(first.id)
    assert refusal(keys, bearer(first.text)).status == 401


def test_revoking_an_unknown_key_raises_an_error(path: Path) -> None:
    KeyFile(path).add("acme", Bounds())
    with pytest.raises(KeyUnknown):
        KeyFile(path).revoke("aaaaaaaa")
    with pytest.raises(KeysUnusable):
        KeyFile(path.with_name("none.json")).revoke("aaaaaaaa")


@pytest.mark.parametrize("name", ["", " ", "a b", "a/b", "é", "a" * 65, "-a", "a\n"])
def test_an_invalid_tenant_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises(SettingsError):
        KeyFile(path).add(name, Bounds())
    assert not path.exists()


def test_a_write_preserves_file_mode_and_symbolic_link(path: Path, tmp_path: Path) -> None:
    """A mounted secret is a symbolic link to a file that its group may read."""
    target = tmp_path / "elsewhere.json"
    KeyFile(target).add("acme", Bounds())
    target.chmod(0o640)
    path.symlink_to(target)
    KeyFile(path).add("acme", Bounds())
    assert path.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert len(KeyFile(target).read().keys) == 2


def test_a_failed_write_does_not_change_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeyFile(path).add("acme", Bounds())
    before = path.read_text()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysUnusable, match="No space left"):
        KeyFile(path).add("acme", Bounds())
    assert path.read_text() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def _add(path: Path, tenant: str) -> None:
    KeyFile(path).add(tenant, Bounds())


def test_concurrent_additions_store_all_keys(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(path, f"tenant-{n}")) for n in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(KeyFile(path).read().keys) == 8
