"""One conversation from prompt to trained row: sampled, scored, evaluated and trained as the same tokens.

A tiny model with SmolLM2's chat template learns to answer, is sampled, judged by a reward model that was trained on
conversations, and trained on what is kept; at each step the tokens are those of transformers' apply_chat_template.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig
from nemo_aligner.engine.checkpoints import nemo_archive
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.engine.reward_model import MegatronRewardModel
from nemo_aligner.stages.offline import evaluation, random_sampler, reward_labeler
from nemo_aligner.stages.supervised import loop, reward_training, sft
from tests import chats
from tests.chats import SMOLLM2, THINKING, assistant, jsonl, system, user
from tests.tiny import ARCHIVED
from tests.unit.stages.plain import logs_to, read_rows

ASKED: list[list[dict[str, str]]] = [
    [user("Is it so?")],
    [user("Is it so?"), assistant("yes"), user("Sure?")],
    [system("Be brief."), user("And now?")],
]
ARCH = replace(ARCHIVED, vocab_size=261, encoder_seq_length=192, max_position_embeddings=192)


@dataclass
class Seen:
    """The tokens that models were given."""

    prompts: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    drawn: dict[tuple[int, int], Response] = field(default_factory=dict)
    scored: list[list[int]] = field(default_factory=list)
    trained: list[Any] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    generate, score, train = MegatronPolicy.generate, MegatronRewardModel.score, loop.train

    def drawn(self: Any, requests: Iterable[GenerationRequest], *how: Any) -> Iterator[Response]:
        requests = list(requests)
        found.prompts |= {(r.prompt_index, r.sample_index): r.prompt_tokens for r in requests}
        for response in generate(self, requests, *how):
            found.drawn[response.prompt_index, response.sample_index] = response
            yield response

    def scored(self: Any, rows: list[list[int]], size: int) -> list[list[float]]:
        found.scored += rows
        return score(self, rows, size)

    def trained(task: Any, *how: Any) -> None:
        found.trained = task.train
        train(task, *how)

    monkeypatch.setattr(MegatronPolicy, "generate", drawn)
    monkeypatch.setattr(MegatronRewardModel, "score", scored)
    monkeypatch.setattr(loop, "train", trained)
    return found


def begun(path: Path, template: str | None) -> str:
    arch = replace(ARCH, tokenizer={**chats.SETTINGS, "chat_template": template})
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        torch.manual_seed(3)
        tokenizer = FastTokenizer(chats.chat_tokenizer(), arch.tokenizer)
        nemo_archive.save_archive(path, build_model(arch, RunOptions()), arch, tokenizer, cluster)
    return str(path)


def trained(cfg: Any, stage: str, folder: Path, archive: str, lr: float, epochs: int) -> Any:
    cfg.trainer.accelerator, cfg.trainer.precision = "cpu", "32"
    settings = getattr(cfg.trainer, stage)
    settings.max_epochs, settings.save_interval = epochs, 0
    logs_to(cfg.exp_manager, folder)
    cfg.model.restore_from_path, cfg.model.seed = archive, 5
    cfg.model.optim = OptimConfig(name="adamw", lr=lr, weight_decay=0.0, betas=[0.9, 0.95], sched=None)
    return cfg


def tuned(
    folder: Path, archive: str, rows: str, *, lr: float, epochs: int, batch: int, template: str | None = None,
    values: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    cfg = trained(SFTConfig(), "sft", folder, archive, lr, epochs)
    cfg.model.data.chat, cfg.model.data.chat_template, cfg.model.data.chat_template_kwargs = True, template, values
    ds = cfg.model.data.train_ds
    ds.file_path, ds.global_batch_size, ds.micro_batch_size, ds.shuffle = rows, batch, 2, False
    sft.run(cfg)
    return str(folder / "checkpoints" / "m.nemo")


def offline(cfg: Any, output: Path, archive: str, rows: str) -> Any:
    cfg.trainer.accelerator, cfg.trainer.precision, cfg.seed = "cpu", "32", 41
    cfg.gpt_model_file, cfg.output_file = archive, str(output)
    cfg.data.file_names, cfg.data.hf_dataset, cfg.data.micro_batch_size = [rows], False, 3
    return cfg


@pytest.mark.processes
@pytest.mark.parametrize(("export_tokens", "given"), [(False, True), (True, False)])
def test_a_conversation_is_the_same_tokens_from_sampler_to_sft(
    tmp_path: Path, seen: Seen, alone: None, export_tokens: bool, given: bool
) -> None:
    """`given`: the first archive has another template, and those who train from it are given theirs, nobody else."""
    theirs = chats.theirs(tmp_path)
    theirs.chat_template = SMOLLM2

    def tokens(messages: list[dict[str, str]], **how: Any) -> list[int]:
        return list(theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **how))

    template = None
    if given:
        template = str(tmp_path / "smollm2.jinja")
        Path(template).write_text(SMOLLM2)
    base = begun(tmp_path / "base.nemo", THINKING if given else SMOLLM2)
    answers = jsonl(tmp_path / "chats", *({"messages": [*m, assistant(a)]} for m in ASKED for a in ("yes", "no")))
    policy = tuned(tmp_path / "sft", base, answers, lr=1e-2, epochs=25, batch=6, template=template)

    pairs = [{"chosen": [*m, assistant("yes")], "rejected": [*m, assistant("no")]} for m in ASKED]
    rm = trained(RMConfig(), "rm", tmp_path / "rm", base, lr=1e-2, epochs=8)
    rm.model.data.data_prefix, rm.model.data.shuffle = {"train": [jsonl(tmp_path / "pairs", *pairs)]}, False
    rm.model.data.chat_template = template
    reward_training.run(rm)
    judge = str(tmp_path / "rm" / "checkpoints" / "m.nemo")
    assert [example.rows for example in seen.trained] == [
        (tokens([*m, assistant("yes")]), tokens([*m, assistant("no")])) for m in ASKED
    ]

    prompts = jsonl(tmp_path / "prompts", *({"messages": m, "id": i} for i, m in enumerate(ASKED)))
    sampler = offline(SamplerConfig(), tmp_path / "generated", policy, prompts)
    sampler.data.n, sampler.inference.tokens_to_generate, sampler.data.export_tokens = 4, 6, export_tokens
    random_sampler.run(sampler)
    generated, drawn = read_rows(tmp_path / "generated"), dict(seen.drawn)
    assert {p: list(seen.prompts[p]) for p in seen.prompts} == {
        (i, s): tokens(m, add_generation_prompt=True) for i, m in enumerate(ASKED) for s in range(4)
    }
    assert [row["messages"] for row in generated] == [m for m in ASKED for _ in range(4)]
    assert [row["id"] for row in generated] == [i for i in range(3) for _ in range(4)]
    assert len({row["output"] for row in generated} & {"yes", "no"}) == 2, "it learned to say both"

    labeler = offline(LabelerConfig(processor="rs", export_reward=True), tmp_path / "filtered", judge, "")
    labeler.data.file_names, labeler.data.max_seq_length = [str(tmp_path / "generated")], 192
    reward_labeler.run(labeler)
    whole = [tokens([*row["messages"], assistant(row["output"])]) for row in generated]
    assert sorted(seen.scored) == sorted(whole)
    rewards = [entry["row"]["reward"] for entry in read_rows(Path(f"{labeler.output_file}_temp/rank_0.json"))]
    kept = read_rows(tmp_path / "filtered")
    best = [max(range(4 * i, 4 * i + 4), key=lambda place: rewards[place]) for i in range(3)]
    assert kept == [{**generated[place], "reward": rewards[place]} for place in best]

    seen.scored.clear()
    judged = offline(EvaluationConfig(policy_files=[policy]), tmp_path / "evaluation.json", policy, prompts)
    judged.data.n, judged.inference.tokens_to_generate, judged.reward_model_file = 4, 6, judge
    evaluation.run(judged)
    found = read_rows(tmp_path / "evaluation.json.m.jsonl")
    assert [(row["messages"], row["output"]) for row in found] == [(r["messages"], r["output"]) for r in generated]
    assert [row["reward"] for row in found] == rewards, "the same text has the same reward, to the last bit"
    assert sorted(seen.scored) == sorted(whole)

    tuned(tmp_path / "next", policy, str(tmp_path / "filtered"), lr=1e-3, epochs=1, batch=3)
    for example, row, place in zip(seen.trained, kept, best, strict=True):
        prompt, response = tokens(row["messages"], add_generation_prompt=True), drawn[divmod(place, 4)]
        assert example.rows[0] == tokens([*row["messages"], assistant(row["output"])])
        assert example.masks[0] == [0] * len(prompt) + [1] * (len(example.rows[0]) - len(prompt))
        if response.finish_reason == "stop":
            assert example.rows[0][: len(prompt) + len(response.tokens)] == [*prompt, *response.tokens]
    assert any(drawn[divmod(place, 4)].finish_reason == "stop" for place in best)


@pytest.mark.processes
def test_the_archive_is_sampled_with_the_values_for_its_template_that_it_was_trained_with(
    tmp_path: Path, seen: Seen, alone: None
) -> None:
    answers = jsonl(tmp_path / "chats", *({"messages": m, "output": "yes"} for m in ASKED))
    prompts = jsonl(tmp_path / "prompts", *({"messages": m} for m in ASKED))
    base, values = begun(tmp_path / "base.nemo", THINKING), {"enable_thinking": False}
    policy = tuned(tmp_path / "sft", base, answers, lr=1e-3, epochs=1, batch=3, values=values)
    learned = [example.rows[0][: example.masks[0].index(1)] for example in seen.trained]

    def sampled(given: dict[str, Any] | None) -> list[list[int]]:
        cfg = offline(SamplerConfig(), tmp_path / f"generated_{len(given or {})}", policy, prompts)
        cfg.inference.tokens_to_generate, cfg.data.n, cfg.data.chat_template_kwargs = 1, 1, given
        random_sampler.run(cfg)
        return [list(tokens) for _, tokens in sorted(seen.prompts.items())]

    assert sampled(None) == learned
    thinking = sampled({"enable_thinking": True})
    assert [len(row) < len(other) for row, other in zip(thinking, learned, strict=True)] == [True] * 3
