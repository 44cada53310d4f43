"""What decides a REINFORCE step besides policy and prompts: a checkpoint of other settings is not gone on from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_aligner.config.reinforce import ReinforceConfig, ReinforceLoopConfig
from nemo_aligner.stages.run_identity import adapter_settings, model_settings, optimizer_settings


def step_settings(cfg: ReinforceConfig) -> dict[str, Any]:
    """What decides a step besides policy and prompts; None is what checkpoints of versions without a key say of it."""
    model, loop, ppo = cfg.model, cfg.trainer.ppo, cfg.model.ppo
    names = ("initial_policy_kl_penalty", "kl_reduction", "baseline", "unfinished", "rollout_batch_seq_length")
    return {
        "model.global_batch_size": model.global_batch_size,
        **{f"trainer.ppo.{name}": value for name, value in _aids(loop).items()},
        **{f"trainer.ppo.{name}": getattr(loop, name) for name in names},
        "trainer.ppo.kl_estimator": loop.estimator,
        **{f"model.ppo.sampling_params.{name}": v for name, v in asdict(ppo.sampling_params).items()},
        **{f"model.ppo.length_params.{name}": v for name, v in asdict(ppo.length_params).items()},
        **optimizer_settings(model.optim, loop.gradient_clip_val),
        **adapter_settings(model.peft),
        **model_settings(model),
        "model.seed": model.seed,
        "model.data.shuffle": model.data.shuffle,
        "model.ppo.num_rollout_samples": ppo.num_rollout_samples,
        "model.ppo.num_rollout_per_prompt": ppo.num_rollout_per_prompt,
    }


def _aids(loop: ReinforceLoopConfig) -> dict[str, Any]:
    """What is done to rewards and to β; None where nothing is, as checkpoints of versions without these keys say.

    `max_kl` is the length of the run, as `max_steps` is.
    """
    return {
        "kl_target": loop.kl_target,
        "kl_horizon": None if loop.kl_target is None else loop.kl_horizon,
        "reward_clip_range": loop.reward_clip_range,
        "overlong_buffer_length": loop.overlong_buffer_length,
        "overlong_buffer_penalty": None if loop.overlong_buffer_length is None else loop.overlong_buffer_penalty,
        "whiten_rewards": loop.whiten_rewards or None,
    }
