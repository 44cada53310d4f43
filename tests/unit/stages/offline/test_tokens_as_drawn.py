"""The tokens that a policy drew are those that are scored and trained, in any tokenizer, whatever they are."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.config.supervised import SFTDatasetConfig
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.data.supervised import sft_examples
from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.offline.random_sampler import sample
from nemo_aligner.stages.offline.reward_labeler import label
from tests.fakes import OneProcess
from tests.vocabularies import vocabulary

PROMPTS = ["the film", "the film ", " Größe:", "日本語", "🙂\n", "x|", "</s> spelt <s>", "naïve café,  two blanks"]


@dataclass
class Dice:
    """A policy that draws any tokens at all, EOS among them."""

    tokenizer: ArchiveTokenizer
    max_sequence_length: int = 400
    drawn: dict[int, list[int]] = field(default_factory=dict)

    def archive_hash(self) -> str:
        return "a" * 64

    def generate(self, requests: Iterable[GenerationRequest], sampling: Any, max_slots: int) -> Iterator[Response]:
        draw, stop = random.Random(5), StopCondition(self.tokenizer, [])
        ordinary = [token for token in range(self.tokenizer.vocab_size) if self.tokenizer.decode([token])]
        for request in requests:
            tokens = draw.choices(ordinary, k=draw.randint(1, 9))
            self.drawn[request.prompt_index] = [*request.prompt_tokens, *tokens]
            ended = [*tokens, self.tokenizer.eos_id] if draw.random() < 0.5 else tokens
            text = stop.text_of(ended, request.prompt_tokens)
            yield Response(request.prompt_index, 0, ended, text, [0.0] * len(ended), [0.0] * len(ended), "stop")


@dataclass
class Judge:
    tokenizer: ArchiveTokenizer
    max_sequence_length: int = 400
    append_eod: bool = False
    stored_standardization: None = None
    scored: list[list[int]] = field(default_factory=list)

    def archive_hash(self) -> str:
        return "b" * 64

    def score(self, rows: list[list[int]], micro_batch_size: int) -> list[list[float]]:
        self.scored += rows
        return [[float(len(row))] for row in rows]


def through(
    folder: Path, tokenizer: ArchiveTokenizer, template: str, export: bool, output: str = "output"
) -> tuple[list[Any], ...]:
    """Tokens as drawn, scored and trained (prompt and response), and the responses' texts in the field `output`."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"input": text}) + "\n" for text in PROMPTS * 6))
    sampler = SamplerConfig(gpt_model_file="m", output_file=str(folder / "samples.jsonl"))
    sampler.data.file_names, sampler.data.hf_dataset = [str(folder / "prompts.jsonl")], False
    sampler.data.export_tokens, sampler.data.output_key = export, output
    policy, judge, cluster = Dice(tokenizer), Judge(tokenizer), OneProcess()
    sample(sampler, open_rows(sampler.data, {"input": "k"}), policy, cluster)  # type: ignore[arg-type]
    labeler = LabelerConfig(gpt_model_file="m", output_file=str(folder / "labeled.jsonl"))
    labeler.data.file_names, labeler.data.hf_dataset = [sampler.output_file], False
    labeler.data.output_key = output
    label(labeler, open_rows(labeler.data, {"input": "k", output: "k"}), judge, cluster)  # type: ignore[arg-type]
    rows = load_rows(labeler.output_file, required={output: "k"})
    settings = SFTDatasetConfig(prompt_template=template, add_eos=False, label_key=output)
    examples = sft_examples(rows, settings, tokenizer, answer_only=True, max_length=400, key="k")
    drawn = [policy.drawn[i] for i in range(len(PROMPTS) * 6)]
    return drawn, judge.scored, [example.rows[0] for example in examples], [row[output] for row in rows]


@pytest.mark.parametrize("output", ["output", "messages"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "metaspace", "llama3"])
def test_what_was_drawn_is_what_is_scored_and_trained(tmp_path: Path, kind: str, output: str) -> None:
    drawn, scored, trained, _ = through(tmp_path, vocabulary(kind), f"{{input}}{{{output}}}", True, output)
    assert scored == drawn
    assert trained == drawn


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "metaspace", "llama3"])
def test_without_them_the_text_is_scored_and_trained(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = vocabulary(kind)
    _, scored, trained, texts = through(tmp_path, tokenizer, "{input}{output}", export=False)
    whole = [prompt + text for prompt, text in zip(PROMPTS * 6, texts, strict=True)]
    assert [tokenizer.decode(row) for row in scored] == [tokenizer.decode(tokenizer.encode(text)) for text in whole]
    assert [tokenizer.decode(row) for row in trained] == [tokenizer.decode(tokenizer.encode(text)) for text in whole]
    assert "their output_token_ids" not in caplog.text


def test_another_tokenizer_scores_the_text_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, other = vocabulary("llama3"), vocabulary("metaspace")
    drawn = other.encode("the film was good")
    row = {"input": "the", "output": " film was good", "output_token_ids": drawn}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    labeler = LabelerConfig(gpt_model_file="m", output_file=str(tmp_path / "labeled.jsonl"))
    labeler.data.file_names, labeler.data.hf_dataset = [str(tmp_path / "samples.jsonl")], False
    judge = Judge(tokenizer)
    label(labeler, open_rows(labeler.data, {"input": "k", "output": "k"}), judge, OneProcess())  # type: ignore[arg-type]
    assert judge.scored == [tokenizer.encode("the film was good")]
    assert "1 responses were scored by their text: their output_token_ids do not say it" in caplog.text
