"""The sampler: every place of the output once, on any number of ranks; an old journal goes on only as it began."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.offline import SamplerConfig
from nemo_aligner.config.schema import InferenceConfig
from nemo_aligner.engine.interfaces import Response
from nemo_aligner.errors import DataError, OutputError, StoppedEarly
from nemo_aligner.event_file import shown_before
from nemo_aligner.stages import run_control
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.offline.random_sampler import Prompts, sample, sampling_params
from tests.fakes import ByteTokenizer, EchoPolicy, OneProcess, RankOfSeveral, on_ranks


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for ranks here, and Python handles signals in the main thread alone."""
    monkeypatch.setattr(run_control.signal, "signal", lambda number, handler: None)


def config(folder: Path, rows: int = 5, **data: Any) -> SamplerConfig:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(json.dumps({"input": f"q{i}", "id": i}) + "\n" for i in range(rows)))
    cfg = SamplerConfig(gpt_model_file="m.nemo", output_file=str(folder / "out.jsonl"))
    cfg.data.file_names, cfg.data.hf_dataset, cfg.data.n = [str(prompts)], False, 3
    for name, value in data.items():
        setattr(cfg.data, name, value)
    return cfg


def run(cfg: SamplerConfig, cluster: Any = None, policy: EchoPolicy | None = None) -> EchoPolicy:
    policy = policy or EchoPolicy()
    sample(cfg, open_rows(cfg.data, {"input": "data.input_key"}), policy, cluster or OneProcess())  # type: ignore[arg-type]
    return policy


def written(cfg: SamplerConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(cfg.output_file).read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_n_responses_of_each_prompt_stand_together_in_prompt_order(tmp_path: Path, ranks: int) -> None:
    cfg = config(tmp_path)
    policies = on_ranks(ranks, lambda cluster: run(cfg, cluster))
    assert written(cfg) == [{"input": f"q{p}", "id": p, "output": f"<{p}.{s}>"} for p in range(5) for s in range(3)]
    asked = [(r.prompt_index, r.sample_index) for policy in policies for r in policy.asked]
    assert sorted(asked) == [(p, s) for p in range(5) for s in range(3)], "no rank draws what another does"
    meta = json.loads(Path(f"{cfg.output_file}.meta.json").read_text())
    assert meta["counts"] == {"prompts": 5, "samples": 15}
    assert meta["archive_sha256"] == "a" * 64
    assert list(meta["inputs_sha256"]) == cfg.data.file_names
    assert meta["config"]["data"]["n"] == 3


def test_loggers_are_told_figures_and_the_first_response_to_each_of_some_prompts(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.exp_manager.create_tensorboard_logger, cfg.exp_manager.log_samples = True, 2
    for _ in range(2):  # run again it stands there once
        run(cfg)
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl_log/metrics.jsonl").read_text().splitlines()]
    told = {"prompts": 5, "samples": 15, "response_characters": 5.0, "empty": 0.0}
    assert row == {"step": 0, **{f"sampler/{name}": value for name, value in told.items()}}
    texts = shown_before(tmp_path / "out.jsonl_log").texts
    shown = [f"input\n\n    q{p}\n\n\noutput\n\n    <{p}.0>\n" for p in range(2)]
    assert texts[0, "table/sampler"] == "\n\n".join(shown)
    assert '"output_file"' in texts[0, "config"]


def test_a_chunk_of_an_online_loop_goes_round_with_noise_of_its_own(tmp_path: Path) -> None:
    cfg = config(tmp_path, n=2, sample_split_size=3, sample_split_iter=1)
    policy = run(cfg)
    # positions 3, 4, 5 of 5 rows
    assert [(row["id"], row["output"]) for row in written(cfg)] == [
        (3, "<3.0>"), (3, "<3.1>"), (4, "<4.0>"), (4, "<4.1>"), (0, "<5.0>"), (0, "<5.1>"),
    ]  # fmt: skip
    assert {r.prompt_index: bytes(r.prompt_tokens) for r in policy.asked} == {3: b"q3", 4: b"q4", 5: b"q0"}


class Interrupted(EchoPolicy):
    """Is told to stop after `count` responses."""

    def __init__(self, cluster: OneProcess, count: int) -> None:
        super().__init__()
        self._cluster, self._count = cluster, count

    def generate(self, *args: Any) -> Iterator[Response]:
        for number, response in enumerate(super().generate(*args), 1):
            if number == self._count:
                self._cluster.any_in_replica = self._cluster.any = lambda flag: True  # type: ignore[method-assign]
            yield response


def test_a_run_that_is_stopped_keeps_what_it_drew_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    cfg, cluster = config(tmp_path), OneProcess()
    first = Interrupted(cluster, 4)
    with pytest.raises(StoppedEarly, match=r"another rank was told to stop; progress is in .*out.jsonl_temp"):
        run(cfg, cluster, first)
    assert not Path(cfg.output_file).exists()
    second = on_ranks(2, lambda cluster: run(cfg, cluster))
    drawn = {(r.prompt_index, r.sample_index) for policy in second for r in policy.asked}
    assert len(drawn) == 15 - 4
    assert len(written(cfg)) == 15


def test_rows_are_flushed_every_checkpoint_interval_of_micro_batches(tmp_path: Path) -> None:
    cfg = config(tmp_path, micro_batch_size=2, n=2)
    cfg.checkpoint_interval = 1
    seen: list[int] = []

    class Watching(EchoPolicy):
        def generate(self, *args: Any) -> Iterator[Response]:
            for response in super().generate(*args):
                journal = Path(f"{cfg.output_file}_temp/rank_0.json")
                seen.append(len(journal.read_text().splitlines()) if journal.exists() else 0)
                yield response

    policy = run(cfg, policy=Watching())
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert policy.slots == 4


def _inference(name: str, value: Any) -> Callable[[SamplerConfig], None]:
    return lambda cfg: setattr(cfg.inference, name, value)


def _data(name: str, value: Any) -> Callable[[SamplerConfig], None]:
    return lambda cfg: setattr(cfg.data, name, value)


def _other_prompts(cfg: SamplerConfig) -> None:
    Path(cfg.data.file_names[0]).write_text('{"input": "another"}\n' * 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda cfg: setattr(cfg, "seed", 5), "seed"),
        (lambda cfg: setattr(cfg.trainer, "precision", "32"), "trainer.precision"),
        (_other_prompts, "data"),
        (_inference("greedy", True), "inference.greedy"),
        (_inference("temperature", 0.5), "inference.temperature"),
        (_inference("top_k", 5), "inference.top_k"),
        (_inference("top_p", 0.5), "inference.top_p"),
        (_inference("repetition_penalty", 1.5), "inference.repetition_penalty"),
        (_inference("end_strings", ["x"]), "inference.end_strings"),
        (_inference("tokens_to_generate", 31), "inference.tokens_to_generate"),
        (_inference("min_tokens_to_generate", 1), "inference.min_tokens_to_generate"),
        (_inference("add_BOS", True), "inference.add_BOS"),
        (_data("n", 2), "data.n"),
        (_data("output_key", "answer"), "data.output_key"),
        (_data("export_metadata", True), "data.export_metadata"),
        (_data("concat_sampling_probabilities", [2.0]), "data.concat_sampling_probabilities"),
        (_data("num_samples", 4), "data.num_samples"),
        (_data("max_seq_length", 9), "data.max_seq_length"),
        (_data("prompt_template", "Q: {input}"), "data.prompt_template"),
        (_data("add_bos", True), "data.add_bos"),
        (_data("sample_split_size", 5), "data.sample_split"),
        (_data("sample_split_iter", 1), "data.sample_split"),
    ],
)
def test_what_decides_the_rows_may_not_change_in_an_old_journal(
    tmp_path: Path, change: Callable[[SamplerConfig], None], named: str
) -> None:
    run(config(tmp_path))
    other = config(tmp_path)
    change(other)
    with pytest.raises(OutputError, match=rf"holds progress of another run: {named} was "):
        run(other)


def test_another_model_may_not_go_on_in_an_old_journal(tmp_path: Path) -> None:
    run(config(tmp_path))
    with pytest.raises(OutputError, match=r"gpt_model_file was 'aaa.*', now 'bbb"):
        run(config(tmp_path), policy=EchoPolicy("b" * 64))


def test_what_does_not_decide_the_rows_may_change(tmp_path: Path) -> None:
    run(config(tmp_path))
    other = config(tmp_path, micro_batch_size=7, hf_dataset=False)
    other.inference.max_batch_slots, other.checkpoint_interval, other.max_time_per_run = 9, 2, "1:0:0"
    assert run(other).asked == [], "all is drawn already"


def test_metadata_is_that_of_the_response_and_added_only_when_asked_for(tmp_path: Path) -> None:
    cfg = config(tmp_path, export_metadata=True, n=2)
    run(cfg)
    assert written(cfg)[:2] == [
        {
            "input": "q0", "id": 0, "output": f"<0.{s}>", "sample_index": s, "num_tokens": 5, "logprob": -7.5,
            "finish_reason": "length" if s else "stop",
        }
        for s in range(2)
    ]  # fmt: skip


class BosTokenizer(ByteTokenizer):
    bos_id = 257  # type: ignore[assignment]


class WithBos(EchoPolicy):
    tokenizer, max_sequence_length = BosTokenizer(), 8


def tokens(cfg: SamplerConfig, policy: EchoPolicy | None = None, position: int = 0) -> tuple[int, ...]:
    rows = open_rows(cfg.data, {"input": "data.input_key"})
    return Prompts(cfg, rows, policy or WithBos()).tokens(position)  # type: ignore[arg-type]


def test_a_prompt_is_template_and_bos_and_cut_at_its_end(tmp_path: Path) -> None:
    assert tokens(config(tmp_path)) == tuple(b"q0")
    assert tokens(config(tmp_path, prompt_template="<{input}>")) == tuple(b"<q0>")
    assert tokens(config(tmp_path, add_bos=True)) == (257, *b"q0")
    with_bos = config(tmp_path)
    with_bos.inference.add_BOS = True
    assert tokens(with_bos) == (257, *b"q0")
    assert tokens(config(tmp_path, add_bos=True, max_seq_length=2)) == (257, *b"q")
    assert tokens(config(tmp_path), position=7) == tuple(b"q2"), "positions go round"


def test_a_prompt_must_leave_room_for_a_token_and_hold_one_itself(tmp_path: Path) -> None:
    assert len(tokens(config(tmp_path, prompt_template="12345{input}"))) == 7
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: the prompt has 8 tokens and the model's context is 8; set"):
        tokens(config(tmp_path, prompt_template="123456{input}"), position=1)
    Path(config(tmp_path).data.file_names[0]).write_text('{"input": ""}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: field 'input' is empty"):
        tokens(config(tmp_path))


@pytest.mark.parametrize(("limit", "cut"), [(1, True), (2, False)])
def test_prompts_that_were_cut_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int, cut: bool
) -> None:
    run(config(tmp_path, max_seq_length=limit, n=1))
    assert ("5 prompts were cut to data.max_seq_length=1" in caplog.text) is cut


def test_inference_settings_reach_the_engine_each_under_its_name() -> None:
    given = InferenceConfig(
        greedy=True, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, min_tokens_to_generate=2,
        tokens_to_generate=11, end_strings=["a", "b"],
    )  # fmt: skip
    found = sampling_params(given, 99)
    assert (found.greedy, found.temperature, found.top_k, found.top_p) == (True, 0.7, 5, 0.9)
    assert (found.repetition_penalty, found.min_tokens, found.max_tokens) == (1.2, 2, 11)
    assert (found.end_strings, found.seed) == (("a", "b"), 99)


def test_ranks_leave_together_when_one_of_them_is_told_to(tmp_path: Path) -> None:
    cfg = config(tmp_path)

    def one(cluster: RankOfSeveral) -> str:
        if cluster.rank == 1:
            cluster.any_in_replica = lambda flag: True  # type: ignore[method-assign]
        with pytest.raises(StoppedEarly):
            run(cfg, cluster)
        return "left"

    assert on_ranks(2, one) == ["left", "left"]
    assert not Path(cfg.output_file).exists()


class Cutter(EchoPolicy):
    """Ends every second response within a character."""

    def generate(self, *args: Any) -> Iterator[Response]:
        for response in super().generate(*args):
            cut = response.sample_index % 2
            yield dataclasses.replace(response, text=response.text + "\N{REPLACEMENT CHARACTER}" * cut)


def test_responses_that_end_within_a_character_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(config(tmp_path), policy=Cutter())
    assert "5 responses end within a character" in caplog.text
    caplog.clear()
    (tmp_path / "whole").mkdir()
    run(config(tmp_path / "whole"))
    assert "within a character" not in caplog.text


def test_a_prompt_that_was_cut_counts_once_whatever_n_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(config(tmp_path, max_seq_length=1))
    assert "5 prompts were cut to data.max_seq_length=1" in caplog.text


class Chatting(EchoPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = ByteTokenizer()
        self.tokenizer.chat_template = "{{ messages }}"  # type: ignore[misc, assignment]


@pytest.mark.parametrize(
    ("policy", "template", "told"),
    [(Chatting(), None, True), (Chatting(), "<user>{input}", False), (EchoPolicy(), None, False)],
)
def test_a_chat_model_that_is_asked_without_a_template_is_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: EchoPolicy, template: str | None, told: bool
) -> None:
    with caplog.at_level(logging.INFO):
        run(config(tmp_path, prompt_template=template), policy=policy)
    assert ("the model has a chat template, and plain prompts go to it as they are" in caplog.text) == told


def test_a_rerun_of_what_is_done_says_that_nothing_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(tmp_path)
    said = "all 15 samples are drawn already"
    with caplog.at_level(logging.INFO):
        run(cfg)
        assert said not in caplog.text
        run(cfg)
        assert said in caplog.text


def test_conversations_and_plain_prompts_may_share_a_file_and_each_is_asked_in_its_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }}[assistant]")
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "id": 1},
        {"input": "b", "messages": "travels"},
        {"system": "s", "conversations": [{"from": "User", "value": "c"}], "chat_template_kwargs": {"mood": "?"}},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(tmp_path, n=1, chat_template=str(template), chat_template_kwargs={"mood": "!"})
    with caplog.at_level(logging.INFO):
        policy = run(cfg)
    assert "2 rows are conversations, 1 are plain prompts" in caplog.text
    asked = {r.prompt_index: bytes(r.prompt_tokens).decode() for r in policy.asked}
    assert asked == {0: "[user]a![assistant]", 1: "b", 2: "[system]s[user]c?[assistant]"}
    assert written(cfg) == [{**row, "output": f"<{i}.0>"} for i, row in enumerate(rows)]


@pytest.mark.parametrize(("limit", "context"), [(8, 64), (9, 9)])
def test_a_conversation_is_not_cut(tmp_path: Path, limit: int, context: int) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    policy = EchoPolicy()
    policy.max_sequence_length = context
    cfg = config(tmp_path, max_seq_length=limit, chat_template="{{ messages[0].content }}: 123456")
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the conversation has 9 tokens; data\.max_seq_length is"):
        run(cfg, policy=policy)
    assert not policy.asked
