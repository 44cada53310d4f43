"""An archive that cannot be read or written is named with its key and its reason, on every rank."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints import archive_tar, nemo_archive
from nemo_aligner.engine.checkpoints.nemo_archive import open_archive, read_architecture, save_archive
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.errors import AlignerError, CheckpointError, OutputError
from nemo_aligner.files import write_atomically
from tests.fakes import OneProcess
from tests.tiny import ARCHIVED

CONFIG = yaml.safe_dump(ARCHIVED.to_nemo())


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[object]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


class Rank(OneProcess):
    """One of several, where the others agreed on `token`, and `fault` is that of another."""

    def __init__(self, *, token: str = "agreed", fault: AlignerError | None = None, is_main: bool = True) -> None:
        super().__init__()
        self.token, self.fault, self.is_main = token, fault, is_main  # type: ignore[misc]
        self.waited = 0

    def broadcast(self, value: Any) -> Any:
        return self.token

    def gather_ranks(self, value: Any) -> list[Any]:
        return [value, self.fault]

    def barrier(self) -> None:
        self.waited += 1


def folder_of(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def packed(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("make", [folder_of, packed])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "model_config.yaml is not valid YAML: while parsing a flow node .*"),
        ("- 1", "model_config.yaml is not a mapping"),
        ("num_layers: 2\nhidden_size: 8", "model_config.yaml lacks ffn_hidden_size, num_attention_heads"),
        (f"{CONFIG}\nrope_scaling: {{unheard_of: 1}}", ".*unheard_of.*"),
    ],
)
def test_a_config_that_says_no_shape_is_named(make: Any, content: str, said: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m.nemo", {"model_config.yaml": content})
    with pytest.raises(CheckpointError, match=rf"^gpt_model_file={path}: {said}$"):
        read_architecture(path, key="gpt_model_file")
    with pytest.raises(CheckpointError, match=rf"^archive={path}: "):
        read_architecture(path)


def test_what_has_no_config_is_no_archive(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "folder", {"other": ""})
    said = r"neither an extracted .nemo archive \(model_config.yaml\) nor a Hugging Face folder \(config.json\)"
    with pytest.raises(CheckpointError, match=rf"^k={path}: {said}$"):
        read_architecture(path, key="k")
    path = packed(tmp_path / "m.nemo", {"other": ""})
    with tarfile.open(path, "a") as tar:  # a folder of that name is none either
        member = tarfile.TarInfo("model_config.yaml")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    said = "the archive has no model_config.yaml, so it is not a .nemo archive"
    with pytest.raises(CheckpointError, match=rf"^k={path}: {said}$"):
        read_architecture(path, key="k")


@pytest.mark.parametrize(("weights", "found"), [({}, "nothing"), ({"model_weights.ckpt": "x"}, "model_weights.ckpt")])
def test_weights_of_another_form_are_named(weights: dict[str, str], found: str, tmp_path: Path) -> None:
    path = packed(tmp_path / "m.nemo", {"model_config.yaml": CONFIG, **weights})
    said = rf"weights are read from model_weights/ \(megatron torch_dist\); found {found}"
    with pytest.raises(CheckpointError, match=rf"^k={path}: {said}$"), open_archive(path, Rank(), key="k"):
        pass


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "m.nemo", {})

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tarfile, "open", refuse)  # root may read everything
    with pytest.raises(CheckpointError, match=rf"^k={path}: no permission to read it$"):
        read_architecture(path, key="k")


SLURM, TORCHRUN = {"SLURM_NODEID": "3"}, {"GROUP_RANK": "2"}


@pytest.mark.parametrize(("node", "name"), [({}, "0"), (SLURM, "3"), (TORCHRUN, "2"), ({**SLURM, **TORCHRUN}, "3")])
def test_one_rank_of_a_node_opens_the_archive_for_all_and_takes_it_away(
    node: dict[str, str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SLURM_NODEID", "GROUP_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in node.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = packed(tmp_path / "m.nemo", {"model_config.yaml": CONFIG, "model_weights/x": ""})
    first, second = Rank(), Rank()
    with open_archive(path, first) as opened:
        assert opened == tmp_path / f"nemo_aligner_archive_agreed_{name}"
        assert opened.stat().st_mode & 0o777 == 0o700, "nobody else may put files there"
        assert (opened / "model_config.yaml").read_text() == CONFIG
        monkeypatch.setenv("LOCAL_RANK", "1")
        with open_archive(path, second) as same:
            assert same == opened
        assert opened.is_dir(), "who did not make it leaves it"
        assert (first.waited, second.waited) == (0, 1)
    assert not opened.exists()
    assert first.waited == 1, "nobody may still be reading"


def test_what_one_rank_cannot_read_no_rank_goes_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = packed(tmp_path / "m.nemo", {"model_config.yaml": CONFIG, "model_weights/x": ""})
    with (
        pytest.raises(CheckpointError, match="said on another node"),
        open_archive(path, Rank(fault=CheckpointError("said on another node")), key="k"),
    ):
        pass
    assert list(tmp_path.iterdir()) == [path], "nothing is left of it"


def test_what_cannot_be_written_is_said_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build_model(ARCHIVED, RunOptions()), FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)

    def save(path: Path, rank: Rank) -> None:
        save_archive(path, model, ARCHIVED, tokenizer, rank)

    (tmp_path / "file").write_text("")
    said = rf"^cannot write {tmp_path}/file/m\.nemo: a folder is needed where {tmp_path}/file is a file$"
    with pytest.raises(OutputError, match=said):
        save(tmp_path / "file" / "m.nemo", Rank())
    path = tmp_path / "m.nemo"
    with pytest.raises(OutputError, match="said by rank 0"):
        save(path, Rank(fault=OutputError("said by rank 0"), is_main=False))

    def full_disk(*args: object, **how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nemo_archive, "pack", full_disk)
    with pytest.raises(OutputError, match=rf"^cannot write {path}: No space left on device$"):
        save(path, Rank())
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_an_archive_is_a_plain_tar_that_begins_with_its_config(tmp_path: Path) -> None:
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    save_archive(tmp_path / "m.nemo", build_model(ARCHIVED, RunOptions()), ARCHIVED, tokenizer, Rank())
    with tarfile.open(tmp_path / "m.nemo", "r:") as tar:
        names = [name for name in tar.getnames() if "/" not in name]
        config = tar.extractfile("model_config.yaml").read()  # type: ignore[union-attr]
    assert names == ["model_config.yaml", "SHA256SUMS", "model_weights", "tokenizer.json"]
    assert list(yaml.safe_load(config)) == list(ARCHIVED.to_nemo()), "in the order of the schema"


def test_the_same_model_is_the_same_bytes_wherever_and_whenever_it_is_saved(tmp_path: Path) -> None:
    model, tokenizer = build_model(ARCHIVED, RunOptions()), FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    for folder in ("first", "second"):
        before = os.umask(0o022 if folder == "first" else 0o077)
        try:
            save_archive(tmp_path / folder / "m.nemo", model, ARCHIVED, tokenizer, Rank())
        finally:
            os.umask(before)
    content = (tmp_path / "first" / "m.nemo").read_bytes()
    assert content == (tmp_path / "second" / "m.nemo").read_bytes()
    assert str(tmp_path).encode() not in content, "the name of no folder of the user's goes with it"
    with tarfile.open(tmp_path / "first" / "m.nemo") as tar:
        assert {(m.uid, m.gid, m.mtime, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def forged(path: Path, **fields: Any) -> Path:
    """An archive with one more member, whose header says what `fields` say."""
    packed(path, {"model_config.yaml": CONFIG, "model_weights/x": ""})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("model_weights/more")
        for name, value in fields.items():
            setattr(member, name, value)
        tar.addfile(member)
    return path


HUGE = 2**40
FORGED = [
    ({"name": "../out"}, "would leave the archive's folder"),
    ({"name": "/tmp/out"}, "would leave the archive's folder"),
    ({"name": "model_weights/../../out"}, "would leave the archive's folder"),
    ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link, a device or sparse; archives hold files"),
    ({"type": tarfile.LNKTYPE, "linkname": "model_config.yaml"}, "is a link, a device or sparse; archives hold files"),
    ({"type": tarfile.CHRTYPE}, "is a link, a device or sparse; archives hold files"),
    ({"type": tarfile.FIFOTYPE}, "is a link, a device or sparse; archives hold files"),
    ({"pax_headers": {"GNU.sparse.major": "0", "GNU.sparse.map": "0,0", "GNU.sparse.size": str(HUGE)}},
     "is a link, a device or sparse; archives hold files"),
    ({"size": HUGE}, f"claims {HUGE} bytes, which the file, truncated or corrupt, has not"),
    ({"name": "./model_config.yaml"}, "is there twice"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), FORGED)
def test_a_member_that_no_archive_should_have_is_refused_and_nothing_of_it_is_written(
    fields: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = forged(tmp_path / "m.nemo", **fields)
    name = fields.get("name", "model_weights/more")
    with (
        pytest.raises(CheckpointError, match=rf"^k={path}: member '{re.escape(name)}' {said}$"),
        open_archive(path, Rank(), key="k"),
    ):
        pass
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["m.nemo", "temporary"]


def test_an_archive_for_which_the_disk_has_no_room_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=len(CONFIG.encode()) + 5))
    path = packed(tmp_path / "m.nemo", {"model_config.yaml": CONFIG, "model_weights/x": "123456"})
    said = f"member 'model_weights/x' has 6 bytes, and the disk of {tmp_path} has room for 5"
    with pytest.raises(CheckpointError, match=rf"^k={path}: {said}$"), open_archive(path, Rank(), key="k"):
        pass


def test_a_config_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_tar, "_MOST_TEXT", 100)
    path = packed(tmp_path / "m.nemo", {"model_config.yaml": CONFIG})
    with pytest.raises(CheckpointError, match=r"model_config\.yaml has \d+ bytes, and none needs over 100$"):
        read_architecture(path, key="k")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "m.nemo"
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    save_archive(path, build_model(ARCHIVED, RunOptions()), ARCHIVED, tokenizer, Rank())
    return path


def is_opened(path: Path) -> bool:
    try:
        with open_archive(path, Rank(), key="k"):
            return True
    except CheckpointError as fault:
        return not str(fault).startswith(f"k={path}: ")


def test_a_flipped_bit_anywhere_in_a_file_is_found_before_a_weight_is_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert is_opened(whole)
    content = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        members = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    places = [offset + at for _, offset, size in members for at in {0, size // 2, size - 1}]
    for place in places:
        content[place] ^= 4
        (tmp_path / "m.nemo").write_bytes(content)
        assert not is_opened(tmp_path / "m.nemo"), place
        content[place] ^= 4
    assert bytes(content) == whole.read_bytes()


def test_an_archive_cut_short_anywhere_is_found_also_between_two_members(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        begins = [member.offset for member in tar]
    for length in [*begins, *(begin + 700 for begin in begins)]:
        (tmp_path / "m.nemo").write_bytes(content[:length])
        assert not is_opened(tmp_path / "m.nemo"), length


def test_an_extracted_folder_is_checked_too_and_one_without_sums_is_read(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with tarfile.open(whole) as tar:
        tar.extractall(folder, filter="data")
    assert is_opened(folder)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    config = folder / "model_config.yaml"
    config.write_text(config.read_text() + "\n")
    with (
        pytest.raises(CheckpointError, match=rf"^k={folder}: model_config\.yaml: not as it was saved, by SHA256SUMS: "),
        open_archive(folder, Rank(), key="k"),
    ):
        pass
    (folder / "SHA256SUMS").write_text("")
    assert not is_opened(folder)
    (folder / "SHA256SUMS").unlink()
    assert is_opened(folder), "other programs write none"


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_what_is_saved_may_be_read_by_whom_the_umask_lets(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
        save_archive(tmp_path / "m.nemo", build_model(ARCHIVED, RunOptions()), ARCHIVED, tokenizer, Rank())
        write_atomically(tmp_path / "text", ["x"])
    finally:
        os.umask(before)
    for name in ("m.nemo", "text"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask
