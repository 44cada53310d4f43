"""Which layout for which model and cluster: memory by part, and overrides ready to paste.

    python scripts/plan_layout.py model=conf/model/llama3_8b.yaml gpus=8 gpu_memory_gb=80
    python scripts/plan_layout.py model=conf/model/llama3_70b.yaml gpus=64 gpu_memory_gb=80 task=actor seq_length=4096
    python examples/nlp/gpt/train_gpt_sft.py +recipes=llama3_8b_sft --cfg job |
        python scripts/plan_layout.py model=conf/model/llama3_8b.yaml gpu_memory_gb=80 run=/dev/stdin

The arithmetic, and when to trust it, is in docs/scaling.md. Exit status 1, and one line, where nothing fits. Keys:
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the clone, where it is not installed

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.load import load_config
from nemo_aligner.config.yaml_file import read_mapping
from nemo_aligner.errors import ConfigError
from nemo_aligner.planning.config import PlanConfig, of_run
from nemo_aligner.planning.plan import make_plan
from nemo_aligner.planning.report import report


def shape_of(model: str) -> Architecture:
    """Of a YAML such as those of conf/model, or of an archive. Raises ConfigError, CheckpointError."""
    if not model.endswith((".yaml", ".yml")):
        from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture

        arch = read_architecture(model, key="model")
        if not arch.vocab_size:  # archives of NeMo leave it to the tokenizer
            raise ConfigError(f"{model} does not say its vocab_size; give a YAML of its shape", "model")
        return arch
    return Architecture.from_nemo(read_mapping(model, "model"), f"model={model}")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        fields = inspect.getsource(PlanConfig).partition('"""\n\n')[2].partition("\n\n    def")[0]
        print(f"{(__doc__ or '').rstrip()}\n\n{fields}")
        return
    words = [word for word in sys.argv[1:] if "=" not in word]
    if words:
        raise ConfigError(f"{words[0]!r} is not of the form key=value; --help says which keys there are")
    from omegaconf import DictConfig, OmegaConf  # here, so that a Python without it is told by our own package

    given = OmegaConf.from_dotlist(sys.argv[1:])
    assert isinstance(given, DictConfig)
    config = load_config(given, PlanConfig)
    arch = shape_of(config.model)
    if config.run is not None:
        run = OmegaConf.create(read_mapping(config.run, "run"))
        config = of_run(config, run, arch)
    config, plan = make_plan(config, arch)
    print(report(config, plan))


if __name__ == "__main__":
    with one_line_errors():
        main()
