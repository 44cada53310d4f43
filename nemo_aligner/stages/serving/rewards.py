"""The reward server: rank 0 talks to clients, every rank scores its share of each batch.

rank 0       clients ─▶ Triton ─▶ broadcast rows ─▶ own share ─▶ gather ─▶ answers
other ranks                       rows           ─▶ own share ─▶ gather
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from nemo_aligner.algorithms.statistics import standardised
from nemo_aligner.config.auth import read_token
from nemo_aligner.config.cut import Sizes
from nemo_aligner.config.rewards import REWARD_MODEL, RewardPlan
from nemo_aligner.config.serving import ServerConfig
from nemo_aligner.data.chat import ChatTemplate, check_template
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.engine.checks import check_is_reward_model, parallel_sizes
from nemo_aligner.engine.interfaces import Cluster, RewardModel
from nemo_aligner.errors import ConfigError
from nemo_aligner.extras import require_extra
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.rewards.interfaces import Candidate, Judgement, Source
from nemo_aligner.rewards.mixture import Mixture
from nemo_aligner.stages.rewarders import RowsSource, functions_of
from nemo_aligner.stages.run_control import StopSignal

log = logging.getLogger(__name__)

_HEARTBEAT_S = 60.0
_KEY, _TEMPLATE = "rm_model_file", "chat_template"


def run(cfg: ServerConfig) -> None:
    """Serve `cfg.rm_model_file`, `cfg.reward_function`, or both, until SIGTERM or SIGINT."""
    require_extra("server", "a reward server")
    check_template(cfg, _TEMPLATE)
    token = read_token(cfg.inference.auth_token_file, "inference.auth_token_file")
    path = cfg.rm_model_file
    if path is not None:
        parallel_sizes(cfg.trainer, path, _sizes(cfg), key=_KEY)
        check_is_reward_model(path, _KEY)
    with functions_of(cfg) as functions:
        if path is None:
            assert functions is not None, "config asks for one of both"
            serve_functions(cfg, functions, token)
        else:
            serve_model(cfg, path, functions, token)


def _sizes(cfg: ServerConfig) -> Sizes:
    tensor, pipeline = cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
    return Sizes(tensor, pipeline, prefix="model.")


def serve_model(cfg: ServerConfig, path: str, functions: Functions | None, token: str | None) -> None:
    from nemo_aligner.engine.loading import start_for_archive
    from nemo_aligner.engine.reward_model import load_reward_model

    with start_for_archive(cfg.trainer, path, _sizes(cfg), key=_KEY) as cluster:
        model = load_reward_model(path, cluster, precision=cfg.trainer.precision, key=_KEY)
        scorer = SharedScorer(model, cluster, cfg.inference.inference_micro_batch_size, standardization(cfg, model))
        with StopSignal() as stop:
            if cluster.is_main:
                talk_to_clients(cfg, model, scorer, stop, token, functions)
                scorer.release()  # after a fault the others may wait elsewhere, and are ended by their watch
            else:
                scorer.follow()


def serve_functions(cfg: ServerConfig, functions: Functions, token: str | None) -> None:
    """Without a model: no tokenizer, no limit but that of bytes, and nothing for the main thread to do but to wait."""
    from nemo_aligner.servers.reward_server import serve
    from nemo_aligner.servers.wire import RequestReader

    largest = cfg.inference.max_text_bytes
    reader = RequestReader(Bytes(), largest + 1, 256, False, largest, check_fields=functions.check_fields)

    def judge(candidates: list[Candidate], rows: list[list[int]]) -> list[Judgement]:
        return functions_alone.submit(candidates).result()

    functions_alone = Mixture({name: functions.source(name) for name in functions.functions}, cfg.reward_plan.weights)
    with StopSignal(functions_alone.hurry) as stop:

        def wait() -> None:
            while stop.name is None:
                time.sleep(0.2)

        serve(cfg.inference, reader, lambda rows: [], wait, token, judge, stop.unless_told)


class Bytes:
    """A tokenizer for those who read texts alone: a text is its bytes."""

    vocab_size, eos_id, pad_id = 256, 0, 0
    bos_id: int | None = None
    chat_template: str | None = None
    stop_ids = frozenset[int]()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        return chr(token)


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
    cfg: ServerConfig,
    model: RewardModel,
    scorer: SharedScorer,
    stop: StopSignal,
    token: str | None,
    functions: Functions | None,
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
        None if functions is None else functions.check_fields,
        model.archive_hash(),
        RowTexts(None, "input", ChatTemplate.of(model.tokenizer, cfg, _TEMPLATE), _TEMPLATE),
    )
    main, heartbeat = MainThread(scorer.score, alone=scorer.alone), Heartbeat(scorer.beat, _HEARTBEAT_S)
    judge = None if functions is None else both(cfg.reward_plan, functions, main.score)

    def run() -> None:
        main.run(lambda: stop.name is not None, heartbeat)

    serve(serving, reader, main.score, run, token, judge, stop.unless_told)


def both(
    plan: RewardPlan, functions: Functions, score: Callable[[list[list[int]]], list[float]]
) -> Callable[[list[Candidate], list[list[int]]], list[Judgement]]:
    """Functions and the reward model on the same texts; functions are asked first, and judge while the model does."""

    def judge(candidates: list[Candidate], rows: list[list[int]]) -> list[Judgement]:
        sources: dict[str, Source] = {name: functions.source(name) for name in functions.functions}
        return Mixture({**sources, REWARD_MODEL: RowsSource(score, rows)}, plan.weights).submit(candidates).result()

    return judge


class SharedScorer:
    """Scores rows on all data-parallel ranks; the others follow what rank 0 does."""

    def __init__(
        self, model: RewardModel, cluster: Cluster, micro_batch_size: int, standardization: tuple[float, float] | None
    ) -> None:
        self._model, self._cluster, self._micro_batch_size = model, cluster, micro_batch_size
        self._standardization = standardization
        self.alone = cluster.world_size == 1

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
