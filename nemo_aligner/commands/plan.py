"""Which layout for which model and cluster: memory by part, and overrides ready to paste.

    aligner plan model=llama3_8b gpus=8 gpu_memory_gb=80
    aligner plan model=llama3_70b gpus=64 gpu_memory_gb=80 task=actor seq_length=4096
    aligner sft +recipes=llama3_8b_sft --cfg job |
        aligner plan model=llama3_8b gpu_memory_gb=80 run=/dev/stdin

The arithmetic, and when to trust it, is in docs/scaling.md. Exit status 1, and one line, where nothing fits.
Keys (???: required; null: chosen, or as the task has it):
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.folders import model_shapes, shape_file
from nemo_aligner.config.keys import Key
from nemo_aligner.config.load import load_config
from nemo_aligner.config.usage import explained
from nemo_aligner.config.yaml_file import read_mapping
from nemo_aligner.errors import ConfigError
from nemo_aligner.planning.config import PlanConfig, of_run
from nemo_aligner.planning.plan import make_plan
from nemo_aligner.planning.report import report


def shape_of(model: str) -> Architecture:
    """Of a shape, by its name or the path of its YAML, or of an archive. Raises ConfigError, CheckpointError."""
    if model.endswith((".yaml", ".yml")) or model in model_shapes():
        return Architecture.from_nemo(read_mapping(shape_file(model, "model"), "model"), f"model={model}")
    from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture

    arch = read_architecture(model, key="model")
    if not arch.vocab_size:  # archives of NeMo leave it to the tokenizer
        raise ConfigError(f"{model} does not say its vocab_size; give a YAML of its shape", "model")
    return arch


def plan_keys() -> list[Key]:
    """Keys of the command with default and meaning, as the fields of PlanConfig have them."""
    fields = re.findall(r"^    (\w+): [^=\n]+ = (\S+)  # (.+)$", inspect.getsource(PlanConfig), re.MULTILINE)
    written = {"MISSING": "???", "None": "null"}
    return [Key(name, written.get(default, default.strip('"')), comment) for name, default, comment in fields]


@one_line_errors()
def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        width = shutil.get_terminal_size((120, 24)).columns
        print("\n".join([(__doc__ or "").rstrip(), "", *explained(plan_keys(), width)]))
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
