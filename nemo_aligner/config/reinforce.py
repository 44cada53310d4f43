"""Config of the REINFORCE actor; the blocks are called `ppo` as in the guide, and nothing in them is PPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_aligner.config.fixed import SAMPLING, check_fixed, check_switched_off
from nemo_aligner.config.loggers import SampleLoggersConfig
from nemo_aligner.config.rewards import RewardSources
from nemo_aligner.config.schema import (
    ExpManagerConfig,
    LoopLimits,
    ModelOverrides,
    OptimConfig,
    SamplingConfig,
    TrainerConfig,
    at_least,
    one_of,
)
from nemo_aligner.config.supervised import BlendedDataConfig, PretrainedCheckpoint
from nemo_aligner.errors import ConfigError

BASELINES = ("RLOO", "ReMax", "none")
KL_ESTIMATORS = ("k1", "abs", "k2", "k3")
KL_REDUCTIONS = ("sum", "mean")
KL_HORIZON = 10_000
OVERLONG_PENALTY = 1.0
_POSITION = ("global_step", "step", "consumed_samples", "epoch", "reinforce_optimization_step")
MONITORS = ("val_rewards", "rewards", "rewards_with_kl", "init_policy_kl", *_POSITION)
"""What `monitor` and `filename` of exp_manager.checkpoint_callback_params may name."""


@dataclass
class ReinforceLoopConfig(LoopLimits):
    """`trainer.ppo`: the loop of rollouts, whose steps are rollout steps, and the objective."""

    val_check_interval: int = 10
    save_interval: int = 10
    keep_rollouts: int = 64  # of each step, written to <log dir>/rollouts/step_<n>.jsonl; 0 = none
    initial_policy_kl_penalty: float = 0.01  # β; 0 = no initial policy is kept
    kl_estimator: str = "k1"  # k1, abs, k2 or k3
    kl_reduction: str = "sum"  # over the tokens of a response: sum or mean
    max_kl: float | None = None  # nats; a step whose mean KL is above it ends the run; null = no end
    kl_target: float | None = None  # nats; β follows it (Ziegler et al. 2019); null = β stays
    kl_horizon: int = KL_HORIZON  # responses; K of the controller = responses of a step / kl_horizon
    reward_clip_range: list[float] | None = None  # [low, high]; null = no clipping
    overlong_buffer_length: int | None = None  # the last tokens of max_length, which cost reward; null = none do
    overlong_buffer_penalty: float = OVERLONG_PENALTY  # of a response of max_length tokens
    whiten_rewards: bool = False  # (r − mean)/std over the responses of a step
    use_absolute_kl: bool | None = None  # NeMo-Aligner 0.7: True is kl_estimator=abs, False is k1
    baseline: str = "RLOO"  # RLOO, ReMax or none
    unfinished: str = "keep"  # responses that hit the length limit: keep, or mask (out of loss and baseline)
    rollout_batch_seq_length: int | None = None  # prompt + response at most; null = the model's context
    trt_llm: dict[str, Any] | None = None  # of NeMo-Aligner; only {enable: False} is accepted
    batch_iterator: dict[str, Any] | None = None  # of NeMo-Aligner; only {use_flask: False} is accepted

    def validate(self) -> None:
        key = "trainer.ppo"
        self.check_limits(key)
        at_least(1, trainer__ppo__val_check_interval=self.val_check_interval)
        at_least(0, trainer__ppo__keep_rollouts=self.keep_rollouts)
        one_of(BASELINES, self.baseline, f"{key}.baseline")
        one_of(KL_ESTIMATORS, self.kl_estimator, f"{key}.kl_estimator")
        one_of(KL_REDUCTIONS, self.kl_reduction, f"{key}.kl_reduction")
        one_of(("keep", "mask"), self.unfinished, f"{key}.unfinished")
        if not self.initial_policy_kl_penalty >= 0:
            raise ConfigError(f"{self.initial_policy_kl_penalty} is below 0", f"{key}.initial_policy_kl_penalty")
        self._check_kl(key)
        self._check_shaping(key)
        check_switched_off(self.trt_llm, "enable", f"{key}.trt_llm")
        check_switched_off(self.batch_iterator, "use_flask", f"{key}.batch_iterator")

    def _check_kl(self, key: str) -> None:
        """The keys of estimator, budget and target. Raises ConfigError."""
        if self.kl_estimator not in (KL_ESTIMATORS[0], self.estimator):  # the first is the default, nobody's wish maybe
            raise ConfigError(
                f"{self.kl_estimator} is not what {key}.use_absolute_kl={self.use_absolute_kl} asks for, "
                f"{self.estimator}; give one of the two",
                f"{key}.kl_estimator",
            )
        for name in ("max_kl", "kl_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{value} is not a number above 0", f"{key}.{name}")
        at_least(1, trainer__ppo__kl_horizon=self.kl_horizon)
        if self.kl_target is None:
            if self.kl_horizon != KL_HORIZON:
                raise ConfigError(f"nothing is done with it without {key}.kl_target", f"{key}.kl_horizon")
            return
        if not self.initial_policy_kl_penalty > 0:
            raise ConfigError(
                f"it multiplies {key}.initial_policy_kl_penalty, which is 0; give that a value to begin with",
                f"{key}.kl_target",
            )
        if self.max_kl is not None and self.max_kl <= self.kl_target:
            raise ConfigError(
                f"{self.max_kl} is not above {key}.kl_target={self.kl_target}: training would end on its way there",
                f"{key}.max_kl",
            )

    def _check_shaping(self, key: str) -> None:
        """The keys of what becomes of rewards. Raises ConfigError."""
        clip = self.reward_clip_range
        if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
            raise ConfigError(f"{list(clip)} are not two numbers, the lower first", f"{key}.reward_clip_range")
        at_least(1, trainer__ppo__overlong_buffer_length=self.overlong_buffer_length)
        if not 0 <= self.overlong_buffer_penalty < math.inf:
            raise ConfigError(
                f"{self.overlong_buffer_penalty} is not a number from 0 on", f"{key}.overlong_buffer_penalty"
            )
        if self.overlong_buffer_length is None and self.overlong_buffer_penalty != OVERLONG_PENALTY:
            raise ConfigError(
                f"nothing is done with it without {key}.overlong_buffer_length", f"{key}.overlong_buffer_penalty"
            )

    @property
    def measures_kl(self) -> bool:
        """Whether an initial policy is kept, to measure the KL to it."""
        return self.initial_policy_kl_penalty > 0 or self.max_kl is not None

    @property
    def estimator(self) -> str:
        """`kl_estimator`, unless the older switch says otherwise."""
        return self.kl_estimator if self.use_absolute_kl is None else ("abs" if self.use_absolute_kl else "k1")


@dataclass
class ReinforceTrainerConfig(TrainerConfig):
    ppo: ReinforceLoopConfig = field(default_factory=ReinforceLoopConfig)


@dataclass
class RolloutSamplingConfig(SamplingConfig):
    """`model.ppo.sampling_params`."""

    use_greedy: bool = False
    all_probs: bool = False
    compute_logprob: bool = False
    end_strings: list[str] = field(default_factory=lambda: ["<|endoftext|>", "<extra_id_1>"])


@dataclass
class ResponseLengthConfig:
    """`model.ppo.length_params`: response tokens."""

    max_length: int | None = None  # null = half of the model's context
    min_length: int = 1

    def validate(self, block: str) -> None:
        """Raises ConfigError, naming the key under `block`."""
        at_least(1, **{f"{block}.max_length": self.max_length})
        at_least(0, **{f"{block}.min_length": self.min_length})
        if self.max_length is not None and self.min_length > self.max_length:
            raise ConfigError(f"{self.min_length} is above {block}.max_length={self.max_length}", f"{block}.min_length")


@dataclass
class RolloutConfig:
    """`model.ppo`: how rollouts are drawn."""

    num_rollout_samples: int = 512  # prompts per rollout step, over all ranks
    num_rollout_per_prompt: int = 4  # responses per prompt
    rollout_micro_batch_size: int = 8  # prompts in flight on each data-parallel rank
    forward_micro_batch_size: int = 8  # responses per forward pass for log-probabilities
    val_rollout_micro_batch_size: int = 8
    num_val_samples: int = 512  # prompts of each validation, the first of the file
    sampling_params: RolloutSamplingConfig = field(default_factory=RolloutSamplingConfig)
    length_params: ResponseLengthConfig = field(default_factory=ResponseLengthConfig)
    offload_adam_states: bool = False  # of NeMo-Aligner: as model.optim.cpu_offload


@dataclass
class PromptDataConfig(BlendedDataConfig):
    """`model.data`: lines of {"text": ...}, {"input": ...} or {"messages": ...}."""

    seq_length: int | None = None  # prompt tokens at most; null = half of the model's context


@dataclass
class ReinforceModelConfig(ModelOverrides):
    restore_from_path: str = "${pretrained_checkpoint.restore_from_path}"
    micro_batch_size: int = 1  # responses per forward and backward pass
    global_batch_size: int = 64  # responses per optimizer step
    ppo: RolloutConfig = field(default_factory=RolloutConfig)
    data: PromptDataConfig = field(default_factory=PromptDataConfig)


@dataclass
class ServerAddress:
    name: str = "reward_model"
    ip: str = "localhost"
    port: int = 5555


@dataclass
class RemoteRewardModelConfig:
    """`remote_critic_rm`: where the reward server is."""

    reward_model: ServerAddress = field(default_factory=ServerAddress)
    init_timeout_s: float = 1800.0  # how long to wait for a server that is not there yet
    inference_timeout_s: float = 1800.0  # how long to go on asking one that stopped answering
    auth_token_file: str | None = None  # the token that the server asks for
    pad_to_length: int | None = None  # null, or model.encoder_seq_length as in NeMo-Aligner; texts are not padded

    def validate(self) -> None:
        if not 0 < self.reward_model.port < 65536:
            raise ConfigError(
                f"{self.reward_model.port} is not a port, 1 to 65535", "remote_critic_rm.reward_model.port"
            )
        for name in ("init_timeout_s", "inference_timeout_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{getattr(self, name)} is not a number of seconds", f"remote_critic_rm.{name}")


@dataclass
class ActorExpManagerConfig(ExpManagerConfig, SampleLoggersConfig):
    """`exp_manager` of the actor."""


@dataclass
class ReinforceConfig(RewardSources):
    name: str = "megatron_gpt_rs_actor"
    trainer: ReinforceTrainerConfig = field(default_factory=ReinforceTrainerConfig)
    exp_manager: ActorExpManagerConfig = field(default_factory=ActorExpManagerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(default_factory=PretrainedCheckpoint)
    remote_critic_rm: RemoteRewardModelConfig = field(default_factory=RemoteRewardModelConfig)
    model: ReinforceModelConfig = field(default_factory=ReinforceModelConfig)

    @property
    def optim(self) -> OptimConfig:
        """`model.optim`, with its state offloaded where either key says so."""
        optim = self.model.optim
        return replace(optim, cpu_offload=optim.cpu_offload or self.model.ppo.offload_adam_states)

    @property
    def responses_per_step(self) -> int:
        """Of a rollout step; the last of an epoch may have fewer."""
        return self.model.ppo.num_rollout_samples * self.model.ppo.num_rollout_per_prompt

    def validate(self) -> None:
        self.trainer.validate()
        self.exp_manager.validate()
        _ = self.reward_plan
        loop, rollout = self.trainer.ppo, self.model.ppo
        loop.validate()
        self.model.check_model(self.exp_manager, self.trainer)
        self.model.data.validate()
        check_fixed(rollout.sampling_params, SAMPLING, "model.ppo.sampling_params")
        self.remote_critic_rm.validate()
        if self.remote_critic_rm.pad_to_length not in (None, self.model.encoder_seq_length):
            raise ConfigError("texts are sent, and nothing is padded; leave it out", "remote_critic_rm.pad_to_length")
        at_least(
            1,
            model__micro_batch_size=self.model.micro_batch_size,
            model__global_batch_size=self.model.global_batch_size,
            model__ppo__num_rollout_samples=rollout.num_rollout_samples,
            model__ppo__num_rollout_per_prompt=rollout.num_rollout_per_prompt,
            model__ppo__rollout_micro_batch_size=rollout.rollout_micro_batch_size,
            model__ppo__forward_micro_batch_size=rollout.forward_micro_batch_size,
            model__ppo__val_rollout_micro_batch_size=rollout.val_rollout_micro_batch_size,
            model__ppo__num_val_samples=rollout.num_val_samples,
        )
        rollout.length_params.validate("model.ppo.length_params")
        rollout.sampling_params.check_sampling("model.ppo.sampling_params")
        if loop.baseline == "RLOO" and rollout.num_rollout_per_prompt == 1:
            raise ConfigError(
                "RLOO compares the responses to one prompt, and 1 has none to be compared with; "
                "give 2 or more, or set trainer.ppo.baseline to ReMax or none",
                "model.ppo.num_rollout_per_prompt",
            )
        self._check_aids()
        if rollout.sampling_params.use_greedy:
            raise ConfigError(
                "greedy responses to one prompt are all alike; set it to False", "model.ppo.sampling_params.use_greedy"
            )

    def _check_aids(self) -> None:
        """What `trainer.ppo` asks of the responses of a step and of their length. Raises ConfigError."""
        loop, longest = self.trainer.ppo, self.model.ppo.length_params.max_length
        if loop.kl_target is not None and loop.kl_horizon < self.responses_per_step:
            raise ConfigError(
                f"{loop.kl_horizon} is below the {self.responses_per_step} responses of a step",
                "trainer.ppo.kl_horizon",
            )
        if loop.whiten_rewards and self.responses_per_step < 3:
            raise ConfigError(
                f"of {self.responses_per_step} whitened rewards only the sign is left; draw 3 responses a step or more",
                "trainer.ppo.whiten_rewards",
            )
        if loop.overlong_buffer_length is not None and loop.overlong_buffer_length > (longest or 0):
            raise ConfigError(
                f"{loop.overlong_buffer_length} is above model.ppo.length_params.max_length={longest}"
                if longest
                else "it is counted from model.ppo.length_params.max_length, which is not given",
                "trainer.ppo.overlong_buffer_length",
            )
