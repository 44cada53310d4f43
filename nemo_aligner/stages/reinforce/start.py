"""From a config to a REINFORCE run: what it reads is checked before its model is loaded."""

from __future__ import annotations

import json
from typing import Any

from nemo_aligner.config.auth import read_token
from nemo_aligner.config.reinforce import MONITORS, ReinforceConfig
from nemo_aligner.data.blending import Blend
from nemo_aligner.data.chat import check_template
from nemo_aligner.data.prompts import open_prompts, other_fields
from nemo_aligner.engine.checks import check_is_policy, check_training
from nemo_aligner.errors import ConfigError
from nemo_aligner.extras import require_extra
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.stages.rewarders import ServedSource, check_fields, functions_of, rewarder_of
from nemo_aligner.stages.run_checks import check_training_settings
from nemo_aligner.stages.run_identity import refuse_other_run, short_hash
from nemo_aligner.stages.run_owner import owning_log_dir
from nemo_aligner.stages.training_template import TEMPLATE, training_template

_ARCHIVE = "pretrained_checkpoint.restore_from_path"


def run(cfg: ReinforceConfig) -> None:
    """Train `pretrained_checkpoint.restore_from_path` for the rewards of a server, of functions, or of both."""
    if cfg.reward_plan.uses_model:
        require_extra("server", "a client of the reward server")
    train, validation = open_rows(cfg)
    check_training_settings(cfg.exp_manager, cfg.model.optim, MONITORS, cfg.trainer.ppo.save_interval)
    check_training(cfg.trainer, cfg.model, key=_ARCHIVE)
    check_is_policy(cfg.model.restore_from_path, _ARCHIVE)
    token = read_token(cfg.remote_critic_rm.auth_token_file, "remote_critic_rm.auth_token_file")

    with owning_log_dir(cfg.exp_manager, cfg.trainer), functions_of(cfg) as functions:
        for rows in (train, validation):
            check_fields(functions, rows, other_fields)
        settings = {"reward_function": reward_settings(cfg, functions, train)}

        from nemo_aligner.engine.loading import start_for_training
        from nemo_aligner.engine.policy import load_policy_for_training
        from nemo_aligner.servers.reward_client import RewardClient
        from nemo_aligner.stages.reinforce.drawing import encode
        from nemo_aligner.stages.reinforce.loop import Actor
        from nemo_aligner.stages.reinforce.settings import step_settings

        with start_for_training(cfg.trainer, cfg.model, key=_ARCHIVE) as cluster:
            refuse_other_run(cfg.exp_manager, cluster, cfg.model.restore_from_path, step_settings(cfg) | settings)
            policy = load_policy_for_training(cfg.model, cfg.trainer, cluster, key=_ARCHIVE)
            chat = training_template(policy, cfg.model.data)
            prompts = encode(cfg, policy, train, chat)
            held_out = [] if validation is None else encode(cfg, policy, validation, chat)
            if cfg.trainer.ppo.measures_kl:
                policy.keep_initial_weights()
            actor = Actor(cfg, policy, cluster, prompts, held_out, settings)
            policy.add_optimizer(
                cfg.optim, clip_grad=cfg.trainer.ppo.gradient_clip_val, max_steps=actor.optimizer_steps
            )
            client = RewardClient(cfg.remote_critic_rm, token) if cfg.reward_plan.uses_model else None
            try:
                if client is not None:
                    client.wait_until_ready()
                served = None if client is None else ServedSource(client)
                actor.train(rewarder_of(cfg.reward_plan, functions, served, cluster), client)
            finally:
                if client is not None:
                    client.close()


def reward_settings(cfg: ReinforceConfig, functions: Functions | None, train: Blend) -> dict[str, Any] | None:
    """What decides the rewards besides the server: the functions, their weights, and the fields that they read."""
    if functions is None:
        return None
    rows = (json.dumps(other_fields(train[index]), sort_keys=True).encode() for index in range(len(train)))
    return {"functions": functions.fingerprint(), "weights": cfg.reward_plan.weights, "fields": short_hash(rows)}


def open_rows(cfg: ReinforceConfig) -> tuple[Blend, Blend | None]:
    """Prompts to train on and to validate on, checked. Raises ConfigError without a file, DataError for bad rows."""
    data = cfg.model.data
    check_template(data, TEMPLATE)
    key = "model.data.data_prefix"
    train, validation = (open_prompts(data.data_prefix, split, f"{key}.{split}") for split in ("train", "validation"))
    if train is None:
        raise ConfigError("required, but not given", f"{key}.train")
    return train, validation
