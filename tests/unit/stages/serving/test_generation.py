"""megatron_gpt_eval: what it answers is what the model says, and what is wrong is said before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.cut import WHOLE
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.prompts import encode_prompts, open_prompts
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.engine import loading
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.stages.serving import generation
from nemo_aligner.stages.serving.prompts import Prompt, read_prompts
from tests import chats
from tests.chats import SMOLLM2, assistant, system, user
from tests.fakes import EchoPolicy, OneProcess, on_ranks
from tests.unit.stages.conftest import Archives
from tests.unit.stages.plain import Plain, opened, read_rows
from tests.unit.stages.refusals import check_refused

TEXTS = ["A film", "It was", "x"]
NEITHER = 'no text in field "text" or "input"; the row has '
ANSWERED = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def config(archives: Archives, **given: Any) -> GenerationConfig:
    cfg = GenerationConfig(gpt_model_file=str(archives.policy), seed=41, **given)
    cfg.trainer.accelerator, cfg.trainer.precision = "cpu", "32"
    cfg.inference.tokens_to_generate, cfg.inference.greedy = 6, True
    return cfg


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt({"input": text}) for text in texts]


@torch.no_grad()
def answered(plain: Plain, text: str, bos: bool) -> dict[str, Any]:
    """The greedy response to a prompt."""
    prompt = [plain.tokenizer.bos_id] * bos + plain.tokenizer.encode(text)
    drawn = plain.likeliest(prompt, 6)
    ended = drawn[-1] == plain.tokenizer.eos_id
    return {
        "input": text,
        "output": plain.tokenizer.decode(drawn),
        "finish_reason": "stop" if ended else "length",
        "num_tokens": len(drawn),
        "logprob": pytest.approx(plain.logprobs([*prompt, *drawn])[len(prompt) - 1 :].sum().item(), abs=1e-3),
    }


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_of_the_command_line_and_of_a_file_are_answered_in_their_order(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]], bos: bool
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    cfg = config(archives, prompts=TEXTS[:1], prompts_jsonl=str(tmp_path / "prompts.jsonl"))
    cfg.output_file, cfg.inference.add_BOS = str(tmp_path / "out.jsonl"), bos
    cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size = 1, 1
    generation.run(cfg)
    with opened(archives.policy) as plain:
        assert read_rows(tmp_path / "out.jsonl") == [answered(plain, text, bos) for text in TEXTS]
    own = {"key": "gpt_model_file", "seed": 41, "sizes": WHOLE}
    assert started == [{"devices": 1, "path": str(archives.policy), **own}]


def test_without_an_output_file_responses_go_to_standard_output_a_line_each(
    archives: Archives, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    generation.run(config(archives, prompts=TEXTS))
    with opened(archives.policy) as plain:
        expected = [answered(plain, text, False) for text in TEXTS]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_prompts_are_scored_token_by_token_and_nothing_is_drawn(
    archives: Archives, tmp_path: Path, alone: None
) -> None:
    cfg = config(archives, prompts=TEXTS[:2], output_file=str(tmp_path / "out.jsonl"))
    cfg.inference.compute_logprob = cfg.inference.add_BOS = True
    generation.run(cfg)
    with opened(archives.policy) as plain, torch.no_grad():
        for row, text in zip(read_rows(tmp_path / "out.jsonl"), TEXTS, strict=False):
            tokens = [plain.tokenizer.bos_id, *plain.tokenizer.encode(text)]
            logprobs = plain.logprobs(tokens)
            assert list(row) == ["input", "tokens", "token_logprobs", "logprob"]
            assert (row["input"], row["tokens"]) == (text, [plain.tokenizer.piece(token) for token in tokens])
            assert row["token_logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)
            assert row["logprob"] == pytest.approx(logprobs.sum().item(), abs=1e-3)
    assert len(read_rows(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_prompts_and_everyone_has_all_answers_in_order(archives: Archives, ranks: int) -> None:
    texts = [f"p{i}" for i in range(5)]

    def one(cluster: Any) -> tuple[list[dict[str, Any]], EchoPolicy]:
        policy = EchoPolicy()
        cfg = config(archives, prompts=texts)
        return generation.answer(cfg, prompts_of(*texts), policy, cluster), policy  # type: ignore[arg-type]

    found = on_ranks(ranks, one)
    asked = [request for _, policy in found for request in policy.asked]
    assert sorted((r.prompt_index, bytes(r.prompt_tokens)) for r in asked) == [
        (i, text.encode()) for i, text in enumerate(texts)
    ]
    for rows, policy in found:
        assert [(row["input"], row["output"]) for row in rows] == [(t, f"<{i}.0>") for i, t in enumerate(texts)]
        assert (rows[0]["num_tokens"], rows[0]["logprob"], rows[0]["finish_reason"]) == (5, -7.5, "stop")
        assert policy.slots == 64
        assert policy.sampling is not None
        assert (policy.sampling.greedy, policy.sampling.max_tokens, policy.sampling.seed) == (True, 6, 41)


def test_as_many_are_drawn_at_once_as_is_said(archives: Archives) -> None:
    cfg, policy = config(archives), EchoPolicy()
    cfg.inference.max_batch_slots = 3
    generation.answer(cfg, prompts_of("a"), policy, OneProcess())  # type: ignore[arg-type]
    assert policy.slots == 3


def test_a_file_of_prompts_has_texts_or_objects_with_one_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff"plain"\n\n{"input": "in", "text": "t"}\n  \n{"text": "é", "id": 3}\n', encoding="utf-8")
    assert [prompt.row for prompt in read_prompts(path)] == [{"input": "plain"}, {"input": "t"}, {"input": "é"}]
    assert [prompt.line for prompt in read_prompts(path)] == [1, 3, 5]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"p\.jsonl:2: not valid JSON \(Expecting property name enclosed in double quotes at column 2\)"),
        ("3", r'p\.jsonl:2: a int where an object such as {"input": ...} is needed$'),
        ('{"prompt": "a"}', rf"p\.jsonl:2: {NEITHER}'prompt'$"),
        ('{"input": 3}', rf"p\.jsonl:2: {NEITHER}'input'$"),
        ('{"messages": "a"}', rf"p\.jsonl:2: {NEITHER}'messages'$"),
        (r'"hi \ud83d"', r"p\.jsonl:2: field 'input' holds \\ud83d, one half of a character$"),
        (r'{"text": "hi \ud83d"}', r"p\.jsonl:2: field 'text' holds \\ud83d, one half of a character$"),
        ("1" * 5000, r"p\.jsonl:2: a number has more digits than Python reads \(4300\)$"),
        ("[" * 100_000, r"p\.jsonl:2: lists or objects are nested over 100 deep$"),
        ('{"messages": []}', r"p\.jsonl:2: messages is empty, there is nothing to go on from$"),
        (ANSWERED, r"p\.jsonl:2: the conversation ends with the assistant's turn: there is nothing to answer$"),
        ('{"messages": [{"role": "user"}]}', r"p\.jsonl:2: the turn .* lacks a role or a text$"),
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'"a"\n{line}\n')
    with pytest.raises(DataError, match=says):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("row", [{"text": "t", "input": "i"}, {"input": "i"}, {"text": "t"}, {"messages": [user("m")]}])
def test_a_row_is_the_prompt_that_it_is_to_reinforce(tmp_path: Path, row: dict[str, Any]) -> None:
    path = Path(chats.jsonl(tmp_path / "p.jsonl", row))
    [own], rows = read_prompts(path), open_prompts({"train": [str(path)]}, "train", "k")
    assert rows is not None
    template = ChatTemplate.of(chats.ours(SMOLLM2), ChatKeys(), "k")
    [theirs] = encode_prompts(rows, str.encode, bos_id=None, limit=999, key="k", chat=template)
    assert RowTexts(None, "input", template, "k").prompt(own.row, path, 1).encode() == bytes(theirs.tokens)


def test_a_prompt_of_a_file_that_does_not_fit_is_named_by_its_line(archives: Archives, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\n\n""\n')
    prompts = [*prompts_of("x"), *read_prompts(tmp_path / "p.jsonl")]
    with pytest.raises(DataError, match=r"p\.jsonl:3: the prompt has 0 tokens; the model takes 1 to 63$"):
        generation.encoded(config(archives), prompts, EchoPolicy())  # type: ignore[arg-type]


def test_a_file_of_prompts_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl: no such file"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b'"\xff"')
    with pytest.raises(DataError, match=r"p\.jsonl:1: not valid UTF-8 at byte 1"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(("length", "fits"), [(0, False), (1, True), (63, True), (64, False)])
def test_a_prompt_has_a_token_and_leaves_room_for_one(archives: Archives, length: int, fits: bool) -> None:
    texts, policy = ["a", "x" * length], EchoPolicy()
    prompts = prompts_of(*texts)
    if fits:
        found = generation.encoded(config(archives), prompts, policy)  # type: ignore[arg-type]
        assert found == [tuple(text.encode()) for text in texts]
        return
    with pytest.raises(ConfigError, match=rf"^prompts: prompt 2 has {length} tokens; the model takes 1 to 63$"):
        generation.encoded(config(archives), prompts, policy)  # type: ignore[arg-type]


def test_conversations_of_a_file_are_asked_as_transformers_renders_them_and_come_back_with_their_turns(
    archives: Archives, tmp_path: Path
) -> None:
    asked = [[system("Be brief."), user("Is it so?")], [user("a"), assistant("b"), user("c")], [system("s"), user("d")]]
    rows = [
        {"messages": asked[0], "id": 3},
        {"input": "plain"},
        {"prompt": asked[1]},
        {"system": "s", "conversations": [{"from": "User", "value": "d"}]},
    ]
    policy = EchoPolicy()
    policy.tokenizer, policy.max_sequence_length = chats.ours(SMOLLM2), 192  # type: ignore[assignment]
    prompts = read_prompts(Path(chats.jsonl(tmp_path / "p.jsonl", *rows)))
    found = generation.answer(config(archives), prompts, policy, OneProcess())  # type: ignore[arg-type]

    theirs = chats.theirs(tmp_path)
    theirs.chat_template = SMOLLM2
    wanted = [tuple(theirs.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in asked]
    plain = tuple(theirs.encode("plain", add_special_tokens=False))
    assert [request.prompt_tokens for request in policy.asked] == [wanted[0], plain, *wanted[1:]]
    assert found[0]["messages"] == asked[0]
    assert [list(row)[:2] for row in found] == [
        ["messages", "output"], ["input", "output"], ["prompt", "output"], ["conversations", "system"]
    ]  # fmt: skip

    policy.tokenizer = chats.ours(None)  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"p\.jsonl:1: the row is a conversation, .* no chat template; give chat_templ"):
        generation.encoded(config(archives), prompts, policy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("prompts_jsonl", "/no.jsonl", "/no.jsonl: no such file"),
        ("chat_template", "{% if", "chat_template: not a valid Jinja template"),
        ("tensor_model_parallel_size", 2, "tensor_model_parallel_size: 2 does not divide"),
        ("pipeline_model_parallel_size", 2, "pipeline_model_parallel_size: 2 does not divide"),
        ("gpt_model_file", "/no.nemo", "gpt_model_file=/no.nemo: no such file"),
        ("gpt_model_file", "JUDGE", "gpt_model_file=JUDGE is a reward model"),
    ],
)
def test_what_is_wrong_is_said_before_it_starts(
    archives: Archives, never_starts: None, key: str, value: Any, says: str
) -> None:
    cfg = config(archives, prompts=TEXTS)
    check_refused(generation.run, cfg, key, value, says, JUDGE=str(archives.judge))


def test_a_server_is_one_copy_of_the_model_and_says_so_before_any_process_starts(
    archives: Archives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "start_for_archive", lambda *args, **how: pytest.fail("processes were started"))
    cfg = config(archives, server=True)
    cfg.trainer.devices = 2
    with pytest.raises(ConfigError, match=r"^trainer\.devices: the server is one copy .* would hold 2; raise tensor"):
        generation.run(cfg)


def test_other_ranks_draw_with_the_first_and_talk_to_nobody(archives: Archives) -> None:
    class Follower:
        served: tuple[Any, int] | None = None

        def serve(self, desk: Any, slots: int) -> None:
            self.served = (desk, slots)

    cluster, policy = OneProcess(), Follower()
    cluster.is_main = False  # type: ignore[misc]
    generation.serve(config(archives, server=True, port=1), policy, cluster)  # type: ignore[arg-type]
    assert policy.served == (None, 64)
