"""What is wrong with a run's archive or its parallel sizes, said before torch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from nemo_aligner.config.cut import AS_STORED, Sizes, check_cut, chosen_sizes
from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checkpoints.nemo_archive import base_of, read_architecture
from nemo_aligner.errors import CheckpointError, ConfigError


def check_is_policy(path: str | Path, key: str) -> None:
    """Raises CheckpointError for the archive of a reward model, or none; `key` names it in the config."""
    if read_architecture(path, key=key).reward_model_type is not None:
        raise CheckpointError(f"{key}={path} is a reward model, not a language model: it has a head instead of logits")


def check_is_reward_model(path: str | Path, key: str) -> None:
    """Raises CheckpointError for the archive of a policy, or none; `key` names it in the config."""
    if read_architecture(path, key=key).reward_model_type is None:
        raise CheckpointError(
            f"{key}={path} is a language model, not a reward model; examples/nlp/gpt/train_reward_model.py makes one"
        )


def parallel_sizes(
    trainer: TrainerConfig,
    path: str | Path,
    sizes: Sizes = AS_STORED,
    *,
    key: str,
) -> tuple[int, int]:
    """Tensor- and pipeline-parallel sizes of a run of the archive at `path`, which `key` names in the config.

    -1 takes the stored size, reduced until it divides the processes and the model; an explicit size that does not is a
    ConfigError, which names the size's key. Raises CheckpointError where there is no archive.
    """
    virtual, context, prefix = sizes.virtual, sizes.context, sizes.prefix
    arch = read_architecture(path, key=key)
    if arch.peft is not None:
        base_of(path, arch, key=key)
    world, there = trainer.devices * trainer.num_nodes, "trainer.devices × trainer.num_nodes"
    if context < 1 or world % context:
        raise ConfigError(f"{context} does not divide {there} = {world}", "model.context_parallel_size")
    if context > 1:
        world, there = world // context, f"{there} / model.context_parallel_size"
    asked = (("tensor_model_parallel_size", sizes.tensor), ("pipeline_model_parallel_size", sizes.pipeline))
    for name, size in asked:
        if size != -1 and (size < 1 or world % size):
            raise ConfigError(f"{size} does not divide {there} = {world}", f"{prefix}{name}")
    tensor, pipeline = chosen_sizes(arch, world, tensor=sizes.tensor, pipeline=sizes.pipeline, virtual=virtual)
    if world % (tensor * pipeline):
        raise ConfigError(
            f"tensor_model_parallel_size {tensor} × pipeline_model_parallel_size {pipeline} = {tensor * pipeline} does "
            f"not divide {there} = {world}",
            f"{prefix}tensor_model_parallel_size",
        )
    check_cut(arch, tensor=tensor, pipeline=pipeline, virtual=virtual, prefix=prefix, of=path)
    return tensor, pipeline


def check_training(trainer: TrainerConfig, model: ModelOverrides, *, key: str) -> None:
    """The archives and the sizes of a training run; `key` names that of the model.

    Raises as `parallel_sizes`, and CheckpointError for an adapter that is not one, or not of the shape asked for.
    """
    if model.peft.lora is not None:
        check_adapter(model.peft, model.peft.lora, model.restore_from_path, key=key)
    arch = read_architecture(model.restore_from_path, key=key)
    model.check_model_has_experts(arch)
    if model.encoder_seq_length is not None and not arch.takes_rows_of(model.encoder_seq_length):
        raise ConfigError(
            f"{model.encoder_seq_length} is above the {arch.max_position_embeddings} positions of the model, which are "
            "learned",
            "model.encoder_seq_length",
        )
    tensor, pipeline = parallel_sizes(trainer, model.restore_from_path, model.sizes, key=key)
    model.check_recomputed_layers(arch.num_layers // (pipeline * model.sizes.virtual))
    if arch.num_moe_experts is not None:
        if model.peft.lora is not None and not model.peft.lora.of_attention_alone:
            raise ConfigError(
                "a model with experts has adapters in its attention alone: attention_qkv, attention_dense or attention",
                "model.peft.lora_tuning.target_modules",
            )
        stage = trainer.devices * trainer.num_nodes // pipeline
        model.check_expert_sizes(arch, tensor=tensor, ranks=stage, sequence_parallel=model.sequence_parallel)


def check_adapter(peft: PeftConfig, lora: LoraTuning, base: str | Path, *, key: str) -> None:
    """The archives of a run that trains an adapter. Raises CheckpointError."""
    if read_architecture(base, key=key).peft is not None:
        raise CheckpointError(
            f"{key}={base} is an adapter; give its base there, and the adapter as model.peft.restore_from_path"
        )
    if peft.restore_from_path is None:
        return
    own = "model.peft.restore_from_path"
    stored = read_architecture(peft.restore_from_path, key=own).peft
    if stored is None:
        raise CheckpointError(f"{own}={peft.restore_from_path} is a whole model, not an adapter")
    begun = LoraTuning.from_nemo(stored)
    for name in ("adapter_dim", "scale", "linears", "variant"):
        if getattr(begun, name) != getattr(lora, name):
            asked = {"scale": "alpha", "linears": "target_modules"}.get(name, name)
            raise CheckpointError(
                f"{own}={peft.restore_from_path} has {asked} {begun.to_nemo()[asked]}, and "
                f"model.peft.lora_tuning.{asked} is {lora.to_nemo()[asked]}"
            )
