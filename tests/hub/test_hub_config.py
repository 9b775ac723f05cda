"""The hub's configuration: what is accepted, and the one line that says what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeguard.errors import ConfigError
from edgeguard.hub import config

MINIMAL = 'fleet = "demo"\nstate_dir = "hub"\n[broker]\nhost = "127.0.0.1"\n'
MODEL = '[[models]]\nname = "signs"\nguarded = "g.tflite"\nkeras = "k.keras"\ndata = "digits"\n'
PRIVATE = '[[models]]\nname = "signs"\nguarded = "g.tflite"\nprivate = true\n'
PARTIES = '[private]\nparties = "parties.json"\n'


def load(tmp_path: Path, text: str) -> config.HubConfig:
    path = tmp_path / "hub.toml"
    path.write_text(text)
    return config.load(path)


def test_a_minimal_file_is_enough(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL)
    assert loaded.policy.alpha == 1e-5
    assert loaded.web.host == "127.0.0.1"
    assert config.store_url(loaded) == f"sqlite:///{tmp_path / 'hub' / 'hub.db'}"


def test_paths_count_from_the_configuration_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + MODEL)
    assert loaded.models[0].guarded == tmp_path / "g.tflite"


def test_a_private_model_needs_no_trainable_form_and_no_data(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + PRIVATE + PARTIES)
    assert (loaded.models[0].keras, loaded.models[0].data, loaded.models[0].private) == (None, None, True)
    assert loaded.private is not None
    assert (loaded.private.parties, loaded.private.min_devices) == (tmp_path / "parties.json", 10)


def test_data_is_a_path_only_where_there_is_such_a_file(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + MODEL).models[0].data == "digits"
    (tmp_path / "digits").touch()
    assert load(tmp_path, MINIMAL + MODEL).models[0].data == str(tmp_path / "digits")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("fleet = 1", "fleet"),
        (MINIMAL + "prot = 1", "prot"),
        (MINIMAL + "[web]\nprot = 1", "prot"),
        (MINIMAL + "port = 0", "port"),
        (MINIMAL + "[policy]\nalpha = 0.0", "alpha"),
        (MINIMAL + "[policy]\ndevice_share = 1.5", "device_share"),
        (MINIMAL + '[policy]\nalpha = "small"', "alpha"),
        (MINIMAL.replace("demo", "De Mo"), "De Mo"),
        (MINIMAL + 'password_file = "p"', "username"),
        (MINIMAL + MODEL + MODEL, "two [[models]]"),
        (MINIMAL + MODEL.replace("signs", "../signs"), "name"),
        (MINIMAL + MODEL.replace('keras = "k.keras"\n', ""), "no keras"),
        (MINIMAL + MODEL.replace('data = "digits"\n', ""), "no data"),
        (MINIMAL + PRIVATE, "without [private]"),
        (MINIMAL + MODEL + "private = true\n" + PARTIES, "keras of a private model"),
        (MINIMAL + PRIVATE + 'data = "digits"\n' + PARTIES, "data of a private model"),
        (MINIMAL + PRIVATE + PARTIES + "min_devices = 2\n", "min_devices"),
        (MINIMAL + PRIVATE + PARTIES + 'kind = "sums"\n', "kind"),
        (MINIMAL + "[private]\n", "parties"),
        (MINIMAL + '[release]\nfolder = "r"\nkeys = "r/keys"', "served"),
        (MINIMAL + "[[[", "TOML"),
        ("\0", "TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        config.load(tmp_path / "nothing.toml")
