"""`key=value` of `aligner plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from omegaconf import MISSING, DictConfig, OmegaConf

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.cut import chosen_sizes
from nemo_aligner.config.schema import PRECISIONS, at_least
from nemo_aligner.errors import ConfigError
from nemo_aligner.planning.tasks import TASKS, sizes_of, task_of


@dataclass
class PlanConfig:
    """null = chosen, or as the task has it."""

    model: str = MISSING  # a shape: llama3_8b, or a YAML of one; or an archive
    gpus: int | None = None  # in all; null = as in `run`
    gpu_memory_gb: float = MISSING  # of one, as its maker counts: 80 for an H100
    gpus_per_node: int = 8  # tensor parallelism stays within a node
    reserve_gb: float = 6.0  # of each GPU, for what is not tensors: CUDA, NCCL, workspaces, gaps between allocations
    task: str = "sft"  # sft, rm, actor, sampler, labeler or server
    run: str | None = None  # file of what a script's --cfg job prints: does that run fit?
    precision: str = "bf16-mixed"  # 32, bf16 or bf16-mixed
    seq_length: int | None = None  # tokens of a row, prompt and response together; null = the model's context
    prompt_length: int | None = None  # tokens of a prompt: actor, sampler
    response_length: int | None = None  # tokens of a response: null = half of the row; sft: with a loss, null = all
    micro_batch_size: int | None = None  # rows of a pass with a gradient; pairs for rm
    global_batch_size: int | None = None  # rows of an optimizer step; null = the task's own
    samples_per_prompt: int | None = None  # responses to a prompt: actor, sampler
    prompts_in_flight: int | None = None  # on each data-parallel rank; null = as fit, 256 responses at most
    forward_micro_batch_size: int | None = None  # rows of a pass without a gradient
    optimizer: str = "distributed_fused_adam"  # as model.optim.name
    tensor_model_parallel_size: int = -1  # -1 = chosen
    pipeline_model_parallel_size: int = -1  # -1 = chosen
    virtual_pipeline_model_parallel_size: int | None = None  # stages of a pipeline rank in training; null = 1
    expert_model_parallel_size: int = -1  # ranks that share the experts of a layer in training; -1 = chosen
    expert_tensor_parallel_size: int | None = None  # ranks that share an expert; null = tensor_model_parallel_size
    sequence_parallel: bool | None = None  # null = with tensor parallelism, where something is trained
    activations_checkpoint_granularity: str = "auto"  # auto = chosen; none, selective or full
    activations_checkpoint_method: str | None = None  # with full: uniform or block
    activations_checkpoint_num_layers: int | None = None  # with full: layers per recomputed part

    def validate(self) -> None:
        if (self.gpus is None) == (self.run is None):
            raise ConfigError("give either gpus, or the run that is to be checked", "gpus")
        sizes = ("gpus", "gpus_per_node", "seq_length", "prompt_length", "response_length", "micro_batch_size")
        more = ("global_batch_size", "samples_per_prompt", "prompts_in_flight", "forward_micro_batch_size")
        others = (
            *("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"),
            "activations_checkpoint_num_layers",
        )
        at_least(1, **{name: getattr(self, name) for name in (*sizes, *more, *others)})
        for name, allowed in (
            ("task", tuple(TASKS)),
            ("precision", PRECISIONS),
            ("activations_checkpoint_granularity", ("auto", "none", "selective", "full")),
            ("activations_checkpoint_method", (None, "uniform", "block")),
        ):
            if getattr(self, name) not in allowed:
                wanted = ", ".join(str(one) for one in allowed if one is not None)
                raise ConfigError(f"{getattr(self, name)!r} is not one of {wanted}", name)
        if not 0 <= self.reserve_gb < self.gpu_memory_gb:
            raise ConfigError(
                f"{self.reserve_gb} is not from 0 to below gpu_memory_gb={self.gpu_memory_gb}", "reserve_gb"
            )


def of_run(config: PlanConfig, run: DictConfig, arch: Architecture) -> PlanConfig:
    """`config` with the sizes of a script's config: nothing is left to choose. Raises ConfigError."""
    name = task_of(run)
    _check_is_counted(run)
    sizes = sizes_of(run, TASKS[name])
    nodes, devices = sizes.pop("num_nodes"), sizes.pop("devices")
    tensor, pipeline = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline"))
    sizes[tensor], sizes[pipeline] = chosen_sizes(
        arch,
        nodes * devices,
        tensor=sizes[tensor] or -1,
        pipeline=sizes[pipeline] or -1,
        virtual=sizes.get("virtual_pipeline_model_parallel_size") or 1,
    )
    if TASKS[name].trains:
        sizes["activations_checkpoint_granularity"] = sizes["activations_checkpoint_granularity"] or "none"
    given = {key: value for key, value in sizes.items() if value is not None}
    return replace(config, task=name, gpus=nodes * devices, gpus_per_node=devices, run=None, **given)


def _check_is_counted(run: DictConfig) -> None:
    """Raises ConfigError for what a run may have and `memory` knows nothing of."""
    for key, without in (("model.context_parallel_size", (None, 1)), ("model.peft.peft_scheme", (None, "none"))):
        value = OmegaConf.select(run, key)
        if value not in without:
            raise ConfigError(f"{value} in {key}, whose memory is not counted here", "run")
