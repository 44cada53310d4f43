"""The evaluation: which samples it draws, whose rewards and KL it reports, on any number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.offline.evaluation import draw, report, score, starts_of, tokens_of
from nemo_aligner.stages.offline.evaluation_figures import numbers
from tests.fakes import ByteTokenizer, EchoPolicy, on_ranks


class ByteSum:
    """The reward of a text is the sum of its tokens."""

    tokenizer, max_sequence_length, append_eod = ByteTokenizer(), 64, False

    def score(self, rows: Sequence[list[int]], micro_batch_size: int) -> list[list[float]]:
        return [[float(sum(row)), -1.0] for row in rows]


def config(folder: Path) -> EvaluationConfig:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"q{i}", "id": i}) + "\n" for i in range(5)))
    cfg = EvaluationConfig(policy_files=["/models/one.nemo"], reward_model_file="rm.nemo")
    cfg.output_file = str(folder / "figures.json")
    cfg.data.file_names, cfg.data.hf_dataset, cfg.data.n = [str(prompts)], False, 2
    return cfg


def figures(cfg: EvaluationConfig, cluster: Cluster, *, kl: bool = True) -> dict[str, Any]:
    rows = open_rows(cfg.data, {"input": "data.input_key"})
    drawn = draw(cfg, rows, EchoPolicy(), cluster, "one.nemo")  # type: ignore[arg-type]
    assert starts_of(drawn) == [2] * len(drawn)
    assert tokens_of(drawn) == [[*d.prompt_tokens, *d.response.tokens] for d in drawn]
    rewards = score(cfg, rows, drawn, ByteSum(), cluster)  # type: ignore[arg-type]
    kls = [float(10 * d.response.prompt_index + d.response.sample_index) for d in drawn] if kl else None
    found = report(cfg, "/models/one.nemo", rows, drawn, rewards, kls, cluster)
    assert found.answers.prompts == [p for p in range(5) for _ in range(2)]
    assert found.shown == [
        {"input": f"q{p}", "output": f"<{p}.0>", "reward": found.answers.rewards[2 * p], "kl": 10.0 * p if kl else None}
        for p in range(5)
    ]
    return found.figures


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_figures_are_over_all_samples_and_each_sample_has_its_own_prompt_reward_and_kl(
    tmp_path: Path, ranks: int
) -> None:
    cfg = config(tmp_path)
    everyone = on_ranks(ranks, lambda cluster: figures(cfg, cluster))
    texts = [(f"q{p}", f"<{p}.{s}>") for p in range(5) for s in range(2)]
    rewards = [float(sum((a + b).encode())) for a, b in texts]
    mean = sum(rewards) / 10
    of_prompts = [sum(rewards[2 * p : 2 * p + 2]) / 2 for p in range(5)]
    between = sum((m - mean) ** 2 for m in of_prompts) / 4
    for found in everyone:
        assert (
            found
            == {
                "policy": "/models/one.nemo",
                "reward_mean": pytest.approx(mean),
                "reward_standard_error": pytest.approx(math.sqrt(between / 5)),
                "reward_std": pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rewards) / 9)),
                "kl": pytest.approx(20.5),
                "response_length": 5.0,
                "finished": 0.5,
                "samples": 10,
                "distinct_1": 1.0,
                "distinct_2": pytest.approx(math.nan, nan_ok=True),  # responses of one word
                "best_of": {
                    "1": pytest.approx(mean),
                    "2": pytest.approx(sum(max(rewards[2 * p : 2 * p + 2]) for p in range(5)) / 5),
                },
            }
        )
    samples = [json.loads(line) for line in (tmp_path / "figures.json.one.jsonl").read_text().splitlines()]
    assert samples == [
        {
            "input": f"q{p}", "id": p, "output": f"<{p}.{s}>", "reward": rewards[2 * p + s], "kl": 10.0 * p + s,
            "num_tokens": 5, "finish_reason": "length" if s else "stop", "prompt_index": p,
        }
        for p in range(5) for s in range(2)
    ]  # fmt: skip


def test_samples_of_policies_go_to_files_of_their_own_names(tmp_path: Path) -> None:
    names = {"m/L-3.1": "L-3.1", "m/L-3.2/": "L-3.2", "a/p.nemo": "p", "a/p.nemo.2": "p.nemo.2", ".": Path.cwd().name}
    cfg = EvaluationConfig(policy_files=list(names), reward_model_file="r", output_file="e.json")
    cfg.data.file_names = ["p.jsonl"]
    cfg.validate()
    assert [cfg.samples_file(path) for path in names] == [f"e.json.{name}.jsonl" for name in names.values()]


def test_loggers_get_every_number_under_a_name_of_its_own() -> None:
    given = {"policy": "p", "kl": None, "samples": 4, "best_of": {"1": 0.5, "4": 0.75}, "win_rate_interval": [0.2, 0.9]}
    assert numbers(given) == {
        "samples": 4, "best_of/1": 0.5, "best_of/4": 0.75, "win_rate_interval/0": 0.2, "win_rate_interval/1": 0.9
    }  # fmt: skip


def test_without_an_initial_policy_there_is_no_kl(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    [found] = on_ranks(1, lambda cluster: figures(cfg, cluster, kl=False))
    assert found["kl"] is None
    first = json.loads((tmp_path / "figures.json.one.jsonl").read_text().splitlines()[0])
    assert first["kl"] is None


@pytest.mark.parametrize(
    ("sampled_of", "judged_of", "judged"),
    [
        ("{input}!", None, "q0!"),
        ("{input}!", "{input}", "q0"),
        ("{input}!", "?{input}", "?q0"),
        (None, "?{input}", "?q0"),
    ],
)
def test_the_reward_model_may_be_shown_another_prompt_than_the_policy(
    tmp_path: Path, sampled_of: str | None, judged_of: str | None, judged: str
) -> None:
    cfg = config(tmp_path)
    cfg.data.prompt_template, cfg.data.reward_prompt_template = sampled_of, judged_of

    def rewards(cluster: Cluster) -> list[float | None]:
        rows = open_rows(cfg.data, {"input": "data.input_key"})
        drawn = draw(cfg, rows, EchoPolicy(), cluster, "one.nemo")  # type: ignore[arg-type]
        assert starts_of(drawn) == [len((sampled_of or "{input}").replace("{input}", "q0"))] * len(drawn)
        return [judgement.reward for judgement in score(cfg, rows, drawn, ByteSum(), cluster)]  # type: ignore[arg-type]

    [found] = on_ranks(1, rewards)
    assert found[:2] == [float(sum(f"{judged}<0.{sample}>".encode())) for sample in range(2)]


def test_with_a_threshold_it_is_told_how_often_one_of_k_samples_passes(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.pass_threshold = float(sum(b"q2<2.0>"))
    [found] = on_ranks(1, lambda cluster: figures(cfg, cluster))
    passed = [sum(sum(f"q{p}<{p}.{s}>".encode()) > cfg.pass_threshold for s in range(2)) for p in range(5)]
    assert 0 < sum(passed) < 10
    assert found["pass_at"] == {
        "1": pytest.approx(sum(passed) / 10),
        "2": pytest.approx(sum(c > 0 for c in passed) / 5),
    }
