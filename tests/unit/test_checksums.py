"""A file is read once for its sum, for as long as it stays what it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nemo_aligner.checksums import file_sum, known_sum


def test_a_file_that_is_as_it_was_is_read_once_and_one_that_was_changed_again(
    tmp_path: Path, hashed_files: list[str]
) -> None:
    path = tmp_path / "a"
    for i, content in enumerate((b"one", b"two", b"longer")):
        if i == 1:
            path.write_bytes(content)  # in its place
        else:
            (tmp_path / "new").write_bytes(content)
            os.replace(tmp_path / "new", path)
        os.utime(path, ns=(i, i))
        for _ in range(2):
            assert known_sum(path) == hashlib.sha256(content).hexdigest()
        assert len(hashed_files) == i + 1
    assert file_sum(path) == known_sum(path)
    assert len(hashed_files) == 4, "who checks a file reads it"
