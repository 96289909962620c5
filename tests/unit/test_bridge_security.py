"""Where a service may listen, what a token must look like, and that none of it shows."""

import pytest

from rollout.errors import UserError
from rollout.security import TOKEN_VARIABLE, Security, is_loopback
from sqlrl_jax import config_file
from sqlrl_jax.config import BridgeConfig

TOKEN = "0123456789abcdef-secret"
TLS = Security(certificate=b"c", key=b"k")


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return str(file)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:80", "[::1]:5", "127.8.8.8:65535"])
def test_loopback_needs_nothing(address):
    assert is_loopback(address)
    Security().require_allowed(address)


@pytest.mark.parametrize("address", ["0.0.0.0:80", "10.0.0.1:80", "[::]:80", "example.org:80"])
@pytest.mark.parametrize(
    "means", [Security(), TLS, Security(token=TOKEN), Security(authority=b"a", token=TOKEN)], ids=str
)
def test_other_addresses_need_encryption_and_a_way_to_know_the_learner(address, means):
    with pytest.raises(UserError, match=r"set bridge\.tls_cert and bridge\.tls_key, and bridge\.token_file or"):
        means.require_allowed(address)


@pytest.mark.parametrize(
    "means",
    [
        Security(b"c", b"k", token=TOKEN),
        Security(b"c", b"k", authority=b"a"),
        Security(trusted_network=True),
    ],
    ids=str,
)
def test_with_them_any_address_will_do(means):
    means.require_allowed("0.0.0.0:80")


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:99999", "127.0.0.1:x"])
def test_malformed_addresses_are_refused(address):
    with pytest.raises(UserError, match="expected host:port"):
        Security().require_allowed(address)


def test_a_token_comes_from_a_file_or_the_environment(token_file, monkeypatch):
    assert Security.load(BridgeConfig()).token == ""
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    assert Security.load(BridgeConfig()).token == "from-the-environment"
    assert Security.load(BridgeConfig(token_file=token_file)).token == TOKEN


def test_a_token_is_neither_shown_nor_saved(token_file, tmp_path):
    config = config_file.load(None, [f"bridge.token_file={token_file}"])
    config_file.save(config, tmp_path / "config.yaml")
    assert TOKEN not in (tmp_path / "config.yaml").read_text()
    assert TOKEN not in repr(Security.load(config.bridge))


def test_a_token_is_not_sent_in_clear_to_another_machine():
    with pytest.raises(UserError, match="the token would be sent in clear"):
        Security(token=TOKEN).channel("10.0.0.1:80")
    Security(token=TOKEN).channel("127.0.0.1:80").close()
    Security(token=TOKEN, trusted_network=True).channel("10.0.0.1:80").close()


@pytest.mark.parametrize("shown", [None, "", "Bearer", f"bearer {TOKEN}", f"Bearer {TOKEN}x", TOKEN, b"\xff\xfe"])
def test_only_the_very_token_is_let_in(shown):
    metadata = [] if shown is None else [("authorization", shown)]
    assert Security(token=TOKEN).admits(metadata)
    assert not Security().admits(metadata)
    assert not Security(token=TOKEN).admits([*Security(token=TOKEN).metadata()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "x"}, "belong together"),
        ({"tls_key": "x"}, "belong together"),
        ({"tls_cert": "/no/file", "tls_key": "/no/file"}, "bridge.tls_cert /no/file: No such file"),
        ({"tls_ca": "/no/file"}, "bridge.tls_ca /no/file: No such file"),
        ({"token_file": "/no/file"}, "bridge.token_file /no/file: No such file"),
        ({"tls_ca": "GARBAGE"}, "no certificate in PEM form"),
        ({"tls_cert": "GARBAGE", "tls_key": "GARBAGE"}, "are no certificate and open key in PEM form"),
        ({"token_file": "GARBAGE"}, "one line of at least 16 ASCII characters"),
        ({"token_file": "EMPTY"}, "one line of at least 16 ASCII characters"),
    ],
)
def test_files_that_will_not_do_are_named(settings, message, tmp_path):
    (tmp_path / "GARBAGE").write_text("two lines\nof nothing")
    (tmp_path / "EMPTY").write_text("")
    placed = {key: str(tmp_path / value) if value.isupper() else value for key, value in settings.items()}
    with pytest.raises(UserError, match=message) as caught:
        Security.load(BridgeConfig(**placed))
    assert "two lines" not in str(caught.value)
