"""A Hugging Face folder in the place of an archive, and what says that it is another one."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from scripts.bench.large_checkpoints import write_random_hf_folder
from tests.functional.conftest import run
from tests.functional.test_commands import SAMPLER, SFT


def test_sampler_and_sft_take_a_hugging_face_folder_and_notice_when_it_is_another(tmp_path: Path) -> None:
    folder, rows, output = tmp_path / "hf", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    write_random_hf_folder(folder, Architecture(2, 64, 96, 4, 300, max_position_embeddings=64, encoder_seq_length=64))
    rows.write_text(json.dumps({"input": "a film", "output": " is good"}) + "\n")
    run(
        "python", SAMPLER, f"gpt_model_file={folder}", f"data.file_names=[{rows}]", "data.hf_dataset=False",
        "inference.tokens_to_generate=4", "trainer.precision=32", f"output_file={output}",
    )  # fmt: skip
    assert json.loads(Path(f"{output}.meta.json").read_text())["archive_sha256"] == archive_hash(folder)
    train = (
        "python", SFT, f"model.restore_from_path={folder}", f"model.data.train_ds.file_path={rows}",
        "model.data.train_ds.global_batch_size=1", "trainer.sft.max_steps=1", "trainer.precision=32",
        f"exp_manager.explicit_log_dir={tmp_path}/results",
    )  # fmt: skip
    run(*train)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    done = run(*train, "trainer.sft.max_steps=2", check=False)
    assert done.returncode == 1
    assert "was made with the archive to start from = " in done.stderr
