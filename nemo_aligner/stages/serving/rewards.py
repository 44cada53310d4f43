"""The reward server: rank 0 talks to clients, every rank scores its share of each batch.

rank 0       clients ─▶ Triton ─▶ broadcast rows ─▶ own share ─▶ gather ─▶ answers
other ranks                       rows           ─▶ own share ─▶ gather
"""

from __future__ import annotations

import logging

from nemo_aligner.algorithms.statistics import standardised
from nemo_aligner.config.auth import read_token
from nemo_aligner.config.serving import ServerConfig
from nemo_aligner.engine.checks import check_is_reward_model, parallel_sizes
from nemo_aligner.engine.interfaces import Cluster, RewardModel
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.run_control import StopSignal

log = logging.getLogger(__name__)

_HEARTBEAT_S = 60.0


def run(cfg: ServerConfig) -> None:
    """Serve `cfg.rm_model_file` until SIGTERM or SIGINT."""
    key, overrides = "rm_model_file", cfg.model
    sizes = {"tensor": overrides.tensor_model_parallel_size, "pipeline": overrides.pipeline_model_parallel_size}
    parallel_sizes(cfg.trainer, cfg.rm_model_file, key=key, **sizes)
    check_is_reward_model(cfg.rm_model_file, key)
    token = read_token(cfg.inference.auth_token_file, "inference.auth_token_file")

    from nemo_aligner.engine.loading import start_for_archive
    from nemo_aligner.engine.reward_model import load_reward_model

    with start_for_archive(cfg.trainer, cfg.rm_model_file, key=key, **sizes) as cluster:
        model = load_reward_model(cfg.rm_model_file, cluster, precision=cfg.trainer.precision, key=key)
        scorer = SharedScorer(model, cluster, cfg.inference.inference_micro_batch_size, standardization(cfg, model))
        with StopSignal() as stop:
            if cluster.is_main:
                try:
                    talk_to_clients(cfg, model, scorer, stop, token)
                finally:
                    scorer.release()
            else:
                scorer.follow()


def standardization(cfg: ServerConfig, model: RewardModel) -> tuple[float, float] | None:
    """Mean and std that rewards are standardised with, None = not at all. Raises ConfigError where unknown."""
    given = cfg.model.reward_standardization
    if not given.enable:
        return None
    known = given.known(model.stored_standardization)
    if known is None:
        raise ConfigError(
            "the reward model stores no mean and std; give them, or leave rewards as they are",
            "model.reward_standardization.enable",
        )
    log.info("answering standardised rewards: (r - %.4f) / %.4f", *known)
    return known


def talk_to_clients(
    cfg: ServerConfig, model: RewardModel, scorer: SharedScorer, stop: StopSignal, token: str | None
) -> None:
    from nemo_aligner.servers.reward_server import Heartbeat, MainThread, serve
    from nemo_aligner.servers.wire import RequestReader

    serving = cfg.inference
    reader = RequestReader(
        model.tokenizer,
        model.max_sequence_length,
        model.vocab_size,
        model.append_eod,
        serving.max_text_bytes,
        model.archive_hash(),
    )
    main, heartbeat = MainThread(scorer.score), Heartbeat(scorer.beat, _HEARTBEAT_S)
    serve(serving, reader, main.score, lambda: main.run(lambda: stop.name is not None, heartbeat), token)


class SharedScorer:
    """Scores rows on all data-parallel ranks; the others follow what rank 0 does."""

    def __init__(
        self, model: RewardModel, cluster: Cluster, micro_batch_size: int, standardization: tuple[float, float] | None
    ) -> None:
        self._model, self._cluster, self._micro_batch_size = model, cluster, micro_batch_size
        self._standardization = standardization

    def score(self, rows: list[list[int]]) -> list[float]:
        """The first reward of each row, in their order; rank 0 alone calls it, the others are in `follow`."""
        rewards = self._together(self._cluster.broadcast(rows))
        return rewards if self._standardization is None else standardised(rewards, *self._standardization)

    def beat(self) -> None:
        """Nothing to do, but the others must not wait for ever."""
        self._cluster.broadcast([])

    def release(self) -> None:
        """Let the other ranks leave `follow`."""
        self._cluster.broadcast(None)

    def follow(self) -> None:
        """Take part in what rank 0 scores, until it releases us."""
        while True:
            rows = self._cluster.broadcast(None)
            if rows is None:
                return
            if rows:
                self._together(rows)

    def _together(self, rows: list[list[int]]) -> list[float]:
        cluster = self._cluster
        mine = rows[cluster.dp_rank :: cluster.dp_size]
        own = [reward[0] for reward in self._model.score(mine, self._micro_batch_size)] if mine else []
        rewards = [0.0] * len(rows)
        for rank, part in enumerate(cluster.gather(own)):
            rewards[rank :: cluster.dp_size] = part
        return rewards
