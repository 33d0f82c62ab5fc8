"""Whether W&B is online: keys of the public server and of one's own, and what is said without one."""

from __future__ import annotations

import pytest

from sam_repro.config.compose import compose_config
from sam_repro.training import wandb_writer
from sam_repro.training.wandb_writer import has_key, start_tracking

OWN = "https://wandb.corp.example:8443"


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in (
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_CONFIG_DIR",
        "WANDB_MODE",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def netrc(folder, machine, name=".netrc"):
    (folder / name).write_text(f"machine {machine}\n  login user\n  password {40 * '0'}\n")


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
@pytest.mark.parametrize("settings", ["environment", "wandb login"])
def test_the_key_counts_for_its_own_server_only(home, monkeypatch, name, settings):
    netrc(home, "api.wandb.ai", name)
    assert has_key()
    if settings == "environment":
        monkeypatch.setenv("WANDB_BASE_URL", OWN)
    else:
        (home / ".config/wandb").mkdir(parents=True)
        (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {OWN}\n")
    assert not has_key()
    netrc(home, "wandb.corp.example:8443", name)
    assert has_key()


def test_a_key_in_the_environment(home, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    assert has_key()


@pytest.mark.parametrize("content", [b"", b"machine", b"\xff\xfe", b"machine github.com login a password b"])
def test_a_netrc_without_a_key(home, content):
    (home / ".netrc").write_bytes(content)
    assert not has_key()


def test_offline_is_said_and_how_it_is_shown_later(home, monkeypatch):
    monkeypatch.setattr(wandb_writer, "Tracker", lambda *_, mode, **__: mode)
    cfg = compose_config(["model=vit_s32", "optim=sam"])
    spoken: list[str] = []
    assert start_tracking(home, cfg, "a", spoken.append) == "offline"
    (sentence,) = spoken
    assert "no key for api.wandb.ai" in sentence and f"sam-repro sync {home}" in sentence
    netrc(home, "api.wandb.ai")
    assert start_tracking(home, cfg, "a", spoken.append) == "online" and len(spoken) == 1


def test_the_real_client_offline_has_a_name_for_people_and_tags(home):
    """W&B's own file of the run holds the name, the tags and where the command is."""
    cfg = compose_config(["experiment=demo", "optim=gsam", "seed=2"])
    tracker = wandb_writer.Tracker(home, cfg, run_id="vit_digits-gsam-s2-0123abcd", mode="offline")
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert not tracker.thread.is_alive()
    (path,) = home.glob("wandb/offline-run-*/run-vit_digits-gsam-s2-0123abcd.wandb")
    stored = path.read_bytes()
    for words in ("vit_digits gsam, digits, seed 2", "its row, runs/demo/ledger/", "loss"):
        assert words.encode() in stored
    assert cfg.log.group == "demo" and stored.count(b"vit_digits") > 1
