"""What is written beside an output says with what it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nemo_aligner.checksums import file_sum
from nemo_aligner.config.offline import SamplerConfig
from nemo_aligner.data.provenance import RUN_RECORD, write_provenance, write_run_record


def test_archive_config_inputs_output_and_counts_are_those_of_the_run(tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(b"prompts\n")
    output.write_text("Ünicode")
    cfg = SamplerConfig(gpt_model_file="m.nemo", output_file=str(output), seed=7)
    cfg.data.file_names, cfg.data.prompt_template = [str(prompts)], "é{input}"
    write_provenance(output, config=cfg, archive="abc", inputs=[(str(prompts), file_sum(prompts))], counts={"rows": 3})
    text = (tmp_path / "out.jsonl.meta.json").read_text()
    found = json.loads(text)
    assert found["archive_sha256"] == "abc"
    assert found["seed"] == found["config"]["seed"] == 7
    assert found["config"]["data"]["prompt_template"] == "é{input}"
    assert found["inputs_sha256"] == {str(prompts): hashlib.sha256(b"prompts\n").hexdigest()}
    assert found["output_sha256"] == file_sum(output) == hashlib.sha256("Ünicode".encode()).hexdigest()
    assert found["counts"] == {"rows": 3}
    assert found["created"].endswith("+00:00")
    assert {"python", "torch", "megatron-core", "tokenizers"} <= found["versions"].keys()
    assert found["versions"]["torch"]
    assert "é" in text
    assert text.endswith("}\n")


def test_a_training_run_says_its_config_and_versions_where_it_logs(tmp_path: Path) -> None:
    write_run_record(tmp_path / "log", {"model": {"seed": 3, "é": Path("a.nemo")}})
    found = json.loads((tmp_path / "log" / RUN_RECORD).read_text())
    assert found["config"] == {"model": {"seed": 3, "é": "a.nemo"}}
    assert found["started"].endswith("+00:00")
    assert found["versions"]["torch"]
