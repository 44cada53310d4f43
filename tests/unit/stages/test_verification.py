"""What is damaged is found and named, and what is sound is not called damaged."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from nemo_aligner.checksums import file_sum, write_sums
from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.data.journal import Journal
from nemo_aligner.data.jsonl import write_jsonl
from nemo_aligner.data.provenance import write_provenance
from nemo_aligner.errors import DataError
from nemo_aligner.stages.verification import verify
from tests.fakes import OneProcess
from tests.unit.stages.conftest import Archives


@pytest.fixture
def results(tmp_path: Path, archives: Archives) -> Path:
    """A folder with one of each kind, all sound."""
    folder = tmp_path / "results"
    (folder / "checkpoints" / "step=3" / "shards").mkdir(parents=True)
    shutil.copy(archives.policy, folder / "checkpoints" / "m.nemo")
    with tarfile.open(archives.policy) as tar:
        tar.extractall(folder / "extracted", filter="data")
    checkpoint = folder / "checkpoints" / "step=3"
    (checkpoint / "shards" / "x").write_bytes(b"weights")
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "step": 3, "files": {"shards/x": 7}}))
    write_sums(checkpoint)
    (folder / "checkpoints" / "step=4.partial").mkdir()
    rows = [{"input": "a", "output": "b"}] * 3
    write_jsonl(folder / "in.jsonl", rows)
    write_jsonl(folder / "out.jsonl", rows)
    counts = {"rows": 3}
    write_provenance(
        folder / "out.jsonl",
        config=LabelerConfig(),
        archive="",
        inputs=[(f"{folder}/in.jsonl", file_sum(folder / "in.jsonl"))],
        counts=counts,
    )
    journal = Journal(folder / "out.jsonl", {"seed": 1}, OneProcess())
    for index in range(3):
        journal.add(index, {"reward": 1.0})
    journal.flush()
    return folder


def verdicts(folder: Path) -> dict[str, tuple[bool, str]]:
    return {str(found.path.relative_to(folder)): (found.is_sound, found.said) for found in verify(folder)}


def test_what_is_sound_is_found_sound_kind_by_kind(results: Path) -> None:
    found = verdicts(results)
    assert all(sound for sound, _ in found.values())
    assert {name: said for name, (_, said) in found.items() if name != "checkpoints/m.nemo"} == {
        "checkpoints/step=3": "checkpoint of step 3",
        "checkpoints/step=4.partial": "what an interrupted save left; the next one removes it",
        "extracted": "extracted archive",
        "in.jsonl": "3 rows",
        "out.jsonl": "3 rows, as out.jsonl.meta.json says",
        "out.jsonl_temp": "journal of 3 rows",
    }
    assert found["checkpoints/m.nemo"][1].startswith("archive of ")


def flipped(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flipped_weight(path: Path) -> None:
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".distcp"))
    flipped(path, member.offset_data + member.size // 2)


def opened_only(path: Path) -> None:
    path.write_text("{")


def doubled(path: Path) -> None:
    path.write_text(path.read_text() * 2)


DAMAGE = [
    ("checkpoints/m.nemo", "checkpoints/m.nemo", flipped_weight, "not as it was saved, by SHA256SUMS: its bytes are"),
    ("checkpoints/step=3/shards/x", "checkpoints/step=3", flipped, "shards/x: not as it was saved, by SHA256SUMS"),
    ("checkpoints/step=3/shards/x", "checkpoints/step=3", doubled, "shards/x: not as it was saved: it has 14 bytes"),
    ("checkpoints/step=3/shards/x", "checkpoints/step=3", Path.unlink, "shards/x: not as it was saved: it is missing"),
    ("checkpoints/step=3/state.json", "checkpoints/step=3", opened_only, "state.json: cannot be read"),
    ("extracted/tokenizer.json", "extracted", flipped, "tokenizer.json: not as it was saved, by SHA256SUMS"),
    ("in.jsonl", "in.jsonl", lambda path: path.write_text('{"input": 1'), "in.jsonl:1: not valid JSON"),
    ("out.jsonl", "out.jsonl", lambda path: path.write_text("{}\n"), "not what out.jsonl.meta.json says was written"),
    ("out.jsonl.meta.json", "out.jsonl", opened_only, "not a provenance file of this program"),
    ("out.jsonl_temp/rank_0.json", "out.jsonl_temp", doubled, "rank_0.json: row 0 is there twice"),
    ("out.jsonl_temp/rank_0.json", "out.jsonl_temp", lambda path: path.write_text("{}\n"), "rank_0.json:1: damaged"),
    ("out.jsonl_temp/fingerprint.json", "out.jsonl_temp", opened_only, "fingerprint.json: damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("victim", "named", "damage", "said"), DAMAGE)
def test_what_is_damaged_is_named_and_nothing_else_is(
    results: Path, victim: str, named: str, damage: object, said: str
) -> None:
    damage(results / victim)  # type: ignore[operator]
    found = verdicts(results)
    assert [name for name, (sound, _) in found.items() if not sound] == [named]
    assert said in found[named][1]


def test_what_a_kill_left_and_what_came_from_elsewhere_is_said_and_sound(results: Path) -> None:
    journal = results / "out.jsonl_temp" / "rank_0.json"
    journal.write_text(journal.read_text() + '{"index": 3, "ro')
    (results / "extracted" / "SHA256SUMS").unlink()
    (results / "in.jsonl").write_text("{}\n")
    found = verdicts(results)
    assert all(sound for sound, _ in found.values())
    assert found["out.jsonl_temp"][1] == "journal of 3 rows, and one that a kill cut off: it is made again"
    assert found["extracted"][1].endswith("no sums are stored in it, so that only its form could be checked")
    assert found["out.jsonl"][1].endswith(f"changed since: {results}/in.jsonl")


@pytest.mark.parametrize(
    ("name", "said"), [("no", "no such file"), (".", "neither an arch"), ("notes.txt", "neither an")]
)
def test_where_there_is_nothing_to_verify_that_is_said(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=said):
        list(verify(tmp_path / name))
