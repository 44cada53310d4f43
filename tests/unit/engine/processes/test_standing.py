"""A command arrives as it was sent, or not at all."""

from __future__ import annotations

import io

import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.processes import cuda_on_cpu, standing
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.engine.processes.standing import receive, send
from nemo_aligner.errors import ConfigError

COMMANDS = [["-m", "package", 'key="a b"', ""], [], ["RANK=1", "two\nlines", "\N{GREEK SMALL LETTER BETA}", "\udcff"]]


def test_commands_arrive_word_for_word_in_their_order() -> None:
    stream = io.BytesIO()
    for words in COMMANDS:
        send(stream, words)
    stream.seek(0)
    assert [receive(stream) for _ in COMMANDS] == COMMANDS
    assert receive(stream) is None


@pytest.mark.parametrize("cut", range(12))
def test_a_command_whose_sender_is_gone_in_the_middle_of_it_is_none(cut: int) -> None:
    stream = io.BytesIO()
    send(stream, ["-m", "module"])
    assert len(stream.getvalue()) == 12
    assert receive(io.BytesIO(stream.getvalue()[:cut])) is None


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_a_stage_that_may_take_the_gpu_is_refused_once_its_process_has_taken_the_cpu(
    accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "program", ["-m", "module"])
    monkeypatch.setitem(cuda_on_cpu.replaced, (torch.cuda, "is_available"), lambda: True)
    said = f"trainer.accelerator: {accelerator}, after a stage of this process with cpu"
    with (
        pytest.raises(ConfigError, match=said),
        start_cluster(TrainerConfig(accelerator=accelerator), tensor=1, pipeline=1),
    ):
        raise AssertionError
