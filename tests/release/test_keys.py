"""Keys of a repository: in files, in the environment, on a token; what they are protected by, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from edgeguard.errors import ConfigError
from edgeguard.release.keys import HUB_PASSPHRASE, PIN, Obtained, Secrets, check_passphrase, load, obtain

PASSPHRASE = "a long passphrase"
SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"


def get(name: str, folder: Path, *, secrets: Secrets | None = None, passphrase: str | None = None) -> Obtained:
    secret = None if passphrase is None else passphrase.encode()
    return obtain(
        name, "root", folder, secrets=secrets or Secrets(environ={}), variable=HUB_PASSPHRASE, passphrase=secret
    )


def private_pem() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def assert_signs(folder: Path, made: Obtained, secrets: Secrets | None = None) -> None:
    """The key that was obtained is found again in its folder, and signs what its public part verifies."""
    (signer,) = load(folder, secrets=secrets or Secrets(environ={}))
    assert signer.public_key == made.key
    made.key.verify_signature(signer.sign(b"payload"), b"payload")


def test_a_new_key_is_its_owners_alone_and_called_after_its_role_and_id(tmp_path: Path) -> None:
    made = get("new", tmp_path / "keys")
    (path,) = (tmp_path / "keys").iterdir()
    assert path.name == f"root-{made.key.keyid[:8]}.pem"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert_signs(path.parent, made)


@pytest.mark.parametrize("how", ["variable", "file", "question"])
def test_an_encrypted_key_is_opened_by_its_passphrase(tmp_path: Path, how: str) -> None:
    made = get("new", tmp_path / "keys", passphrase=PASSPHRASE)
    (path,) = (tmp_path / "keys").iterdir()
    assert b"ENCRYPTED" in path.read_bytes()
    (tmp_path / "secret").write_text(f"{PASSPHRASE}\n")
    secrets = {
        "variable": Secrets(environ={HUB_PASSPHRASE: PASSPHRASE}),
        "file": Secrets(environ={f"{HUB_PASSPHRASE}_FILE": str(tmp_path / "secret")}),
        "question": Secrets(environ={}, ask=lambda what: PASSPHRASE if str(path) in what else ""),
    }
    assert_signs(path.parent, made, secrets[how])


@pytest.mark.parametrize(
    ("secrets", "reason"),
    [
        (Secrets(environ={}), f"got none; set {HUB_PASSPHRASE}"),
        (
            Secrets(environ={HUB_PASSPHRASE: "another passphrase"}),
            f"not opened by this passphrase; check {HUB_PASSPHRASE}",
        ),
        (Secrets(environ={f"{HUB_PASSPHRASE}_FILE": "/nowhere"}), "/nowhere"),
    ],
    ids=["none", "wrong", "file missing"],
)
def test_an_encrypted_key_that_cannot_be_opened_is_one_clear_line_without_the_secret(
    tmp_path: Path, secrets: Secrets, reason: str
) -> None:
    get("new", tmp_path, passphrase=PASSPHRASE)
    with pytest.raises(ConfigError, match=reason) as error:
        load(tmp_path, secrets=secrets)
    assert "\n" not in str(error.value)
    assert "another passphrase" not in str(error.value)


def test_a_passphrase_that_does_not_hold_against_a_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 6 characters; expected at least 12"):
        check_passphrase("secret")


def test_a_key_in_the_environment_leaves_only_its_name_in_the_folder(tmp_path: Path) -> None:
    secrets = Secrets(environ={"ROOT_KEY": private_pem().decode()})
    made = get("env:ROOT_KEY", tmp_path, secrets=secrets)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".json"
    assert b"PRIVATE" not in path.read_bytes()
    assert_signs(tmp_path, made, secrets)
    with pytest.raises(ConfigError, match="no such environment variable"):
        load(tmp_path, secrets=Secrets(environ={}))
    with pytest.raises(ConfigError, match="another key at env:ROOT_KEY"):
        load(tmp_path, secrets=Secrets(environ={"ROOT_KEY": private_pem().decode()}))


def test_a_key_in_a_file_elsewhere_is_referred_to(tmp_path: Path) -> None:
    path = tmp_path / "mine.pem"
    path.write_bytes(private_pem())
    path.chmod(0o600)
    made = get(str(path), tmp_path / "keys")
    assert_signs(tmp_path / "keys", made)
    path.unlink()
    with pytest.raises(ConfigError, match=r"mine\.pem; got No such file"):
        load(tmp_path / "keys")


def test_a_public_key_can_be_trusted_and_not_signed_with(tmp_path: Path) -> None:
    path = tmp_path / "colleague.pem"
    key = Ed25519PrivateKey.generate().public_key()
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    made = get(str(path), tmp_path / "keys")
    assert made.signer is None
    assert not (tmp_path / "keys").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_a_key_that_openssl_made_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    make = ["openssl", "genpkey", "-algorithm", "ed25519", "-aes256", "-pass", f"pass:{PASSPHRASE}", "-out", str(path)]
    subprocess.run(make, check=True)
    path.chmod(0o600)
    (signer,) = load(path, secrets=Secrets(environ={HUB_PASSPHRASE: PASSPHRASE}))
    signer.public_key.verify_signature(signer.sign(b"payload"), b"payload")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    secrets = Secrets(environ={"ROOT_KEY": private_pem().decode()})
    get("env:ROOT_KEY", tmp_path, secrets=secrets)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="one is there already"):
        get("env:ROOT_KEY", tmp_path, secrets=secrets)
    assert path.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_links_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert_signs(tmp_path / "keys", get("new", tmp_path / "keys"))


def test_where_the_file_system_keeps_no_modes_no_key_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: real(path, flags, mode | 0o755))
    with pytest.raises(ConfigError, match="cannot keep it from other users; use one like ext4"):
        get("new", tmp_path / "keys")
    assert not list((tmp_path / "keys").iterdir())


def test_a_key_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(Path, "replace", fail)
        with pytest.raises(ConfigError, match="Input/output error"):
            get("new", tmp_path / "keys")
    assert not list((tmp_path / "keys").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pem", b"nonsense", "expected a PKCS8 key"),
        ("a.pem", b"", "expected a PKCS8 key"),
        ("a.json", b"{}", "expected a key's reference"),
        ("a.json", b"[1]", "expected a key's reference"),
        ("a.json", b"\xff", "expected a key's reference"),
        ("a.json", json.dumps({"uri": "env:X", "keyid": "1", "public": {}}).encode(), "expected a key's reference"),
    ],
)
def test_a_file_that_is_no_key_is_one_clear_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=reason) as error:
        load(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda folder: None, "no keys there"),
        (lambda folder: folder.rmdir(), "No such file"),
        (lambda folder: get("new", folder) and [path.chmod(0o640) for path in folder.iterdir()], "chmod 600"),
    ],
    ids=["empty", "missing", "readable by others"],
)
def test_a_folder_without_usable_keys_is_one_clear_line(
    tmp_path: Path, prepare: Callable[[Path], object], reason: str
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(ConfigError, match=reason):
        load(folder)


# --- a PKCS#11 token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hsm:", "hsm:2", "hsm:2?label=none", "hsm:two"])
def test_a_token_that_is_not_there_is_one_clear_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="key hsm:") as error:
        get(name, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token made of software, with one ECDSA key under number 2."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    if not Path(SOFTHSM).exists() or shutil.which("pkcs11-tool") is None:
        pytest.skip("SoftHSM2 and pkcs11-tool are not installed")
    (tmp_path / "tokens").mkdir()
    configuration = tmp_path / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {tmp_path}/tokens\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(configuration))
    monkeypatch.setenv("PYKCS11LIB", SOFTHSM)
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "test", "--pin", "123456", "--so-pin", "1234"],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        ["pkcs11-tool", "--module", SOFTHSM, "--login", "--pin", "123456", "--token-label", "test", "--keypairgen",
         "--key-type", "EC:prime256v1", "--id", "02", "--label", "key"],
        check=True, capture_output=True,
    )  # fmt: skip
    return "hsm:2?label=test"


SIGN_ON_TOKEN = """
import sys
from pathlib import Path
from edgeguard.errors import ConfigError
from edgeguard.release.keys import PIN, Secrets, load, obtain

folder, right = Path(sys.argv[2]), Secrets(environ={PIN: "123456"})
made = obtain(sys.argv[1], "root", folder, secrets=right, variable="X", passphrase=None)
(signer,) = load(folder, secrets=right)
assert signer.public_key == made.key
made.key.verify_signature(signer.sign(b"payload"), b"payload")
try:
    obtain("hsm:3?label=test", "root", folder, secrets=right, variable="X", passphrase=None)
except ConfigError as error:
    print(error)
"""


def test_a_key_on_a_token_signs_with_its_pin_and_never_leaves_it(token: str, tmp_path: Path) -> None:
    """In a process of its own: a PKCS#11 library reads its configuration once."""
    done = subprocess.run(
        [sys.executable, "-c", SIGN_ON_TOKEN, token, str(tmp_path / "keys")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "key hsm:3?label=test" in done.stdout
    (path,) = (tmp_path / "keys").iterdir()
    assert json.loads(path.read_text())["uri"] == token
    assert PIN not in path.read_text()
