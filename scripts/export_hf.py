"""Write a policy's .nemo archive as a Hugging Face folder that transformers loads.

python scripts/export_hf.py --input policy.nemo --output folder
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.errors import CheckpointError, OutputError


def export(source: Path, target: Path) -> None:
    """config.json, model.safetensors and the tokenizer's files. Raises CheckpointError for reward models."""
    from nemo_aligner.config.schema import TrainerConfig
    from nemo_aligner.engine.loading import load_for_inference, start_for_archive
    from nemo_aligner.engine.nemo_archive import read_architecture

    arch = read_architecture(source, key="--input")
    if arch.reward_model_type is not None:
        raise CheckpointError(f"--input {source}: a reward model, whose head has no Hugging Face form; give a policy")
    trainer = TrainerConfig(accelerator="cpu")
    with start_for_archive(trainer, source, key="--input", tensor=1, pipeline=1) as cluster:
        from safetensors.torch import save_file

        from nemo_aligner.engine.hf_weights import to_hf, to_hf_config

        loaded = load_for_inference(source, cluster, precision=arch.precision, key="--input")
        tensors = {name: value for name, value in loaded.module.state_dict().items() if hasattr(value, "shape")}
        dtype = "bfloat16" if arch.precision.startswith("bf16") else "float32"
        try:
            target.mkdir(parents=True, exist_ok=True)
            save_file(to_hf(arch, tensors), target / "model.safetensors", metadata={"format": "pt"})
            (target / "config.json").write_text(json.dumps(to_hf_config(arch, dtype), indent=1))
            for name, content in loaded.tokenizer.files.items():
                (target / name).write_bytes(content)
            special = {k: v for k, v in arch.tokenizer.items() if k.endswith("_token") or k == "chat_template"}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in special.items() if v}}
            (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        except OSError as fault:
            raise OutputError(f"cannot write {target}: {fault.strerror or fault}") from fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a policy's .nemo archive")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    export(args.input, args.output)


if __name__ == "__main__":
    with one_line_errors():
        main()
