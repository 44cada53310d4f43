"""A token comes from a file, and a fault of the file never shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aligner.config.auth import read_token
from nemo_aligner.errors import ConfigError

KEY = "inference.auth_token_file"


@pytest.mark.parametrize("token", ["0123456789abcdef", "A-Z.a_z~+/0123456789=="])
def test_a_token_is_read_without_its_line_end(token: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{token}\n")
    assert read_token(str(tmp_path / "token"), KEY) == token
    assert read_token(None, KEY) is None


@pytest.mark.parametrize(
    "content", ["", "\n", "short", "0123456789abcde", "two words 0123456789", "line-one-0123456\nline-two"]
)
def test_what_is_no_token_is_refused_and_not_shown(content: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^{KEY}: {path} holds no token: ") as caught:
        read_token(str(path), KEY)
    assert not content.strip() or content.strip() not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{KEY}: {tmp_path}/no cannot be read: No such file or directory$"):
        read_token(str(tmp_path / "no"), KEY)
    (tmp_path / "bytes").write_bytes(b"\xff" * 32)
    with pytest.raises(ConfigError, match="cannot be read: not a text of ASCII characters"):
        read_token(str(tmp_path / "bytes"), KEY)
