"""Whatever the disk refuses, and whenever: one line, nothing half-written, and the run after it has the same result."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.hf_folder import write_hf_folder
from nemo_aligner.engine.checkpoints.nemo_archive import save_archive
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer, byte_tokenizer
from nemo_aligner.engine.interfaces import Response
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.errors import AlignerError, OutputError
from nemo_aligner.metrics import MetricsLogger
from nemo_aligner.owner import lock_of, sole_owner
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.offline.random_sampler import sample
from nemo_aligner.stages.offline.reward_labeler import label
from tests.fakes import EchoPolicy, OneProcess
from tests.faulty_disk import FaultyDisk, small_disk
from tests.tiny import ARCHIVED, trainable
from tests.unit.stages.offline import test_loop_record, test_random_sampler, test_reward_labeler

Output = Callable[[Path], None]
"""Writes a result below a folder."""


@pytest.fixture(scope="module")
def trained() -> Iterator[MegatronTrainable]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield trainable(cluster)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def sampled(inputs: Path, out: Path, policy: EchoPolicy | None = None) -> None:
    cfg = test_random_sampler.config(inputs)
    cfg.output_file, cfg.checkpoint_interval = str(out / "out.jsonl"), 1
    with sole_owner(lock_of(cfg.output_file)):
        sample(cfg, open_rows(cfg.data, {"input": "data.input_key"}), policy or EchoPolicy(), OneProcess())  # type: ignore[arg-type]


def labeled(inputs: Path, out: Path) -> None:
    cfg = test_reward_labeler.config(inputs)
    cfg.output_file, cfg.checkpoint_interval = str(out / "out.jsonl"), 1
    rows = open_rows(cfg.data, {"input": "data.input_key", "output": "data.output_key"})
    label(cfg, rows, test_reward_labeler.ByteSum(), OneProcess())  # type: ignore[arg-type]


def recorded(inputs: Path, out: Path) -> None:
    test_loop_record.iteration(inputs, 0)
    test_loop_record.record(out, 0, inputs / "g.jsonl", inputs / "l.jsonl", 2)


def logged(inputs: Path, out: Path) -> None:
    logger = MetricsLogger(out / "log", tensorboard=True, resumed_at=0)
    logger.log(1, "train", {"loss": 1.0})
    logger.close()


@functools.cache
def model() -> Any:
    return build_model(ARCHIVED, RunOptions())


def archived(inputs: Path, out: Path) -> None:
    tokenizer = FastTokenizer(byte_tokenizer(), ARCHIVED.tokenizer)
    save_archive(out / "m.nemo", model(), ARCHIVED, tokenizer, OneProcess())  # type: ignore[arg-type]


def exported(inputs: Path, out: Path) -> None:
    weights = {name: weight.detach() for name, weight in model().named_parameters()}
    write_hf_folder(out / "hf", ARCHIVED, weights, FastTokenizer(byte_tokenizer(), ARCHIVED.tokenizer))


def checkpointed(inputs: Path, out: Path, trained: MegatronTrainable) -> None:
    trained.save_training_state(out / "step=1-last", {"step": 1})


@dataclass(frozen=True)
class Case:
    """What is written, and which of its names may be there when the disk has refused."""

    write: Callable[..., None]
    kept: tuple[str, ...] = ()


CASES = {
    "sampler": Case(sampled, ("out.jsonl_temp", "out.jsonl")),
    "labeler": Case(labeled, ("out.jsonl_temp", "out.jsonl")),
    "loop": Case(recorded, ("iterations", "iterations.jsonl", "tensorboard")),
    "metrics": Case(logged, ("log",)),
    "archive": Case(archived, ("m.nemo",)),
    "checkpoint": Case(checkpointed, ("step=1-last",)),
    "export": Case(exported, ("hf",)),
}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def write(case: Case, tmp_path: Path, trained: MegatronTrainable) -> Output:
    (tmp_path / "inputs").mkdir()
    more: dict[str, Any] = {"trained": trained} if case.write is checkpointed else {}
    return lambda out: case.write(tmp_path / "inputs", out, **more)


def files(folder: Path) -> dict[str, bytes]:
    """Every file that a run must have alike, by name; of TensorBoard's and of provenance the name alone."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "ballast":
            name, content = str(path.relative_to(folder)), path.read_bytes()
            events = path.name.startswith("events.")
            found[str(Path(name).with_name("events")) if events else name] = (
                b"" if events or path.name.endswith(".meta.json") else content
            )
    return found


def refused(write: Output, out: Path, said: str) -> bool:
    """Whether the disk refused something, which was said in one line."""
    fault: AlignerError | None = None
    try:
        write(out)
    except AlignerError as found:
        fault = found
    if fault is None:
        return False
    assert isinstance(fault, OutputError)
    for part in ("cannot write ", str(out), said):
        assert part in str(fault)
    return True


def _is_of_a_write(name: str) -> bool:
    """Whether no reader looks at it, and the next run takes it away."""
    return name.endswith(".lock") or any(
        part.endswith(".partial") or (part.startswith(".") and part != ".metadata") for part in name.split("/")
    )


def check_nothing_is_half_written(case: Case, out: Path, wanted: dict[str, bytes]) -> None:
    """What has its final name is what it should be; a journal may end sooner."""
    for name, content in files(out).items():
        if not _is_of_a_write(name):
            assert name.split("/")[0] in case.kept, name
            grows = "_temp/" in name or name.endswith(("metrics.jsonl", "events"))
            assert wanted[name].startswith(content) if grows else wanted[name] == content, name


pytestmark = pytest.mark.processes  # none is started, but they take as long

FAULTS = {"full": (errno.ENOSPC, False), "over the quota": (errno.EDQUOT, False), "read-only": (errno.EROFS, True)}


@pytest.mark.parametrize(
    ("fault", "case"),
    [(fault, case) for case in CASES for fault in FAULTS if fault != "over the quota" or case == "sampler"],
    indirect=["case"],
)
def test_a_disk_that_refuses_any_change_is_one_line_and_the_next_run_has_the_same_result(
    fault: str, case: Case, write: Output, tmp_path: Path
) -> None:
    number, removals = FAULTS[fault]
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    for at in range(1, 1000):
        out = tmp_path / f"out_{at}"
        out.mkdir()
        disk = FaultyDisk(out, number, removals=removals)
        with disk.failing_from(at):
            if not refused(write, out, os.strerror(number)):
                break
        check_nothing_is_half_written(case, out, wanted)
        write(out)
        assert files(out) == wanted, f"after the disk refused change {at}"
    assert at > 3, "it changes more than that"


class Removing(EchoPolicy):
    """Somebody removes `path` after the first three responses are flushed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def generate(self, *arguments: Any) -> Iterator[Response]:
        for number, response in enumerate(super().generate(*arguments), 1):
            if number == 5:
                shutil.rmtree(self._path) if self._path.is_dir() else self._path.unlink()
            yield response


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ("inputs/prompts.jsonl", None),
        ("out/out.jsonl_temp", "cannot write {out}/out.jsonl_temp/rank_0.json: No such file or directory"),
        ("out/out.jsonl_temp/rank_0.json", "{out}/out.jsonl_temp: 3 of 15 rows are not there any more"),
        ("out/out.jsonl_temp/fingerprint.json", None),
    ],
)
def test_what_somebody_removes_during_a_run_is_not_missed_or_named_and_the_next_run_has_the_same_result(
    tmp_path: Path, removed: str, says: str | None
) -> None:
    for name in ("inputs", "whole", "out"):
        (tmp_path / name).mkdir()
    sampled(tmp_path / "inputs", tmp_path / "whole")
    out, policy = tmp_path / "out", Removing(tmp_path / removed)
    if says is None:
        sampled(tmp_path / "inputs", out, policy)
    else:
        with pytest.raises(OutputError) as fault:
            sampled(tmp_path / "inputs", out, policy)
        assert str(fault.value).startswith(says.format(out=out))
        assert not (out / "out.jsonl").exists()
        sampled(tmp_path / "inputs", out)
    assert (out / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_disk_that_fills_up_anywhere_is_one_line_and_with_room_the_same_run_ends_well(
    case: Case, write: Output, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    with small_disk(tmp_path / "disk") as disk:
        free = 0
        while True:
            out = disk.root / "out"
            out.mkdir()
            disk.leave_free(free)
            if not refused(write, out, os.strerror(errno.ENOSPC)):
                break
            check_nothing_is_half_written(case, out, wanted)
            disk.empty()
            write(out)
            assert files(out) == wanted, f"after the disk was full behind {free} bytes"
            shutil.rmtree(out)
            free += max(4096, free // 4 // 4096 * 4096)
        assert free >= 4096


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("metrics",)], indirect=True)
def test_a_disk_that_cannot_make_a_file_durable_is_one_line(
    case: Case, write: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fsync that fails is said, and so is each after it."""
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    synced, number = os.fsync, 0
    for at in range(1, 1000):
        out = tmp_path / f"out_{at}"
        out.mkdir()
        number = 0

        def fails(descriptor: int, at: int = at, out: Path = out) -> None:
            nonlocal number
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{out}/"):
                return
            number += 1
            if number == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            synced(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            if not refused(write, out, os.strerror(errno.EIO)):
                break
        check_nothing_is_half_written(case, out, wanted)
        write(out)
        assert files(out) == wanted, f"after fsync {at} failed"
    assert at > 1, "it makes something durable"
