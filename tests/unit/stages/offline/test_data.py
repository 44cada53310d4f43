"""What the offline scripts refuse before any model is loaded, and the rows they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.offline import OfflineDataConfig, SamplerConfig
from nemo_aligner.errors import ConfigError, DataError, OutputError
from nemo_aligner.stages.offline import evaluation
from nemo_aligner.stages.offline.data import check_output, check_templates, open_rows


def config(folder: Path, *files: str) -> SamplerConfig:
    cfg = SamplerConfig(gpt_model_file="m", output_file=str(folder / "out.jsonl"))
    cfg.data.file_names, cfg.data.hf_dataset = [str(folder / name) for name in files], False
    for name in files:
        (folder / name).write_text("".join(f'{{"input": "{name}{i}"}}\n' for i in range(3)))
    return cfg


def test_the_output_is_none_of_the_inputs(tmp_path: Path) -> None:
    check_output(config(tmp_path, "a", "b"))
    with pytest.raises(OutputError, match=r"is also an input, .*out\.jsonl \(data\.file_names\)"):
        check_output(config(tmp_path, "a", "out.jsonl"))
    cfg = config(tmp_path, "a")
    cfg.gpt_model_file = f"{tmp_path}/./out.jsonl"
    with pytest.raises(OutputError, match=r"is also an input, .*out\.jsonl \(gpt_model_file\)"):
        check_output(cfg)
    for name in (str(tmp_path), f"hf:{tmp_path}:test"):
        cfg = config(tmp_path, "a")
        cfg.data.file_names = [name]
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        check_output(cfg)
        (tmp_path / "out.jsonl").touch()
        with pytest.raises(OutputError, match=r"is also an input, .*out\.jsonl \(data\.file_names\)"):
            check_output(cfg)


def test_the_samples_of_an_evaluation_are_not_written_over_what_it_samples_from(tmp_path: Path) -> None:
    cfg = EvaluationConfig(policy_files=["m/p.nemo"], gpt_model_file="m/p.nemo", output_file=str(tmp_path / "e.json"))
    cfg.data.file_names = [f"{tmp_path}/../{tmp_path.name}/e.json.p.jsonl"]
    with pytest.raises(
        OutputError, match=r"^.*e\.json\.p\.jsonl, beside output_file, is also an input, .*e\.json\.p\.jsonl"
    ):
        evaluation.run(cfg)
    cfg.data.file_names, cfg.reward_model_file = [], f"{tmp_path}/./e.json"
    with pytest.raises(OutputError, match=r"^output_file=.*e\.json is also an input, .*e\.json \(reward_model_file\)"):
        evaluation.run(cfg)


def test_a_field_of_the_rows_that_a_template_names_and_does_not_fill_in_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path, "a")
    (tmp_path / "a").write_text('{"input": "x", "context": "y"}\n')
    told = "data.prompt_template leaves {context} as it is, though rows have such a field: {input} alone is filled in"
    for template, is_told in (("{context} {input}", True), ("\\boxed{answer} {input}", False), ("{input}", False)):
        caplog.clear()
        cfg.data.prompt_template = template
        open_rows(cfg.data, {"input": "data.input_key"})
        assert (told in caplog.text) is is_told


def test_a_template_says_where_the_prompt_goes() -> None:
    check_templates(OfflineDataConfig())
    check_templates(OfflineDataConfig(prompt_template="Q: {text}", input_key="text"))
    with pytest.raises(ConfigError, match=r"data\.prompt_template: 'Q: \{input\}' lacks \{text\}"):
        check_templates(OfflineDataConfig(prompt_template="Q: {input}", input_key="text"))


@pytest.mark.parametrize("key", ["output_key", "reward_key"])
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "a"}]}),
        ("prompt", {"prompt": [{"role": "user", "content": "a"}], "messages": "none"}),
        ("system", {"conversations": [{"from": "User", "value": "a"}]}),
    ],
)
def test_nothing_is_written_over_a_conversation(
    tmp_path: Path, key: str, name: str, answered: bool, row: dict[str, Any]
) -> None:
    (field,) = (field for field, value in row.items() if isinstance(value, list))
    if answered:
        row = {**row, field: [*row[field], {"from": "assistant", "role": "assistant", "content": "b", "value": "b"}]}
    (tmp_path / "rows.jsonl").write_text(f'{{"input": "plain", "{name}": "x"}}\n{json.dumps(row)}\n')
    data = OfflineDataConfig(file_names=[str(tmp_path / "rows.jsonl")])
    setattr(data, key, name)
    fields = {"input": "data.input_key"} | ({data.output_key: "data.output_key"} if answered else {})
    if answered and key == "reward_key":
        (tmp_path / "rows.jsonl").write_text(f'{{"input": "plain", "output": "x"}}\n{json.dumps(row)}\n')
    said = rf"rows\.jsonl:2: {name!r} is of the conversation, and data\.{key} would take its place$"
    with pytest.raises(DataError, match=said):
        open_rows(data, fields)


def test_files_are_blended_by_their_weights_and_the_number_of_rows_asked_for(tmp_path: Path) -> None:
    cfg = config(tmp_path, "a", "b")
    cfg.data.concat_sampling_probabilities, cfg.data.num_samples = [3.0, 1.0], 8
    texts = [row["input"] for row in open_rows(cfg.data, {"input": "data.input_key"})]
    assert len(texts) == 8
    assert sum(text.startswith("a") for text in texts) == 6
    assert [text for text in texts if text.startswith("b")] == ["b0", "b1"]


def test_a_weight_for_each_file_and_a_text_in_each_row(tmp_path: Path) -> None:
    cfg = config(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match=r"data\.concat_sampling_probabilities: 1 weights for 2 files"):
        open_rows(cfg.data, {})
    cfg.data.concat_sampling_probabilities = [1.0, 1.0]
    with pytest.raises(DataError, match=r"a:1: no field 'output' \(data\.output_key\)"):
        open_rows(cfg.data, {"output": "data.output_key"})


def test_rows_read_through_datasets_are_the_same_and_cached_where_asked(tmp_path: Path) -> None:
    cfg = config(tmp_path, "a")
    plain = list(open_rows(cfg.data, {}))
    cfg.data.hf_dataset, cfg.data.index_mapping_dir = True, str(tmp_path / "cache")
    assert list(open_rows(cfg.data, {})) == plain
    assert any((tmp_path / "cache").iterdir())
