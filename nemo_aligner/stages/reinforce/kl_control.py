"""The KL coefficient of a run, step by step, and the KL at which the run ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nemo_aligner.algorithms.shaping import next_kl_penalty
from nemo_aligner.config.reinforce import ReinforceConfig

log = logging.getLogger(__name__)


class KLControl:
    """`penalty` is β of the step to come; `spent` says whether the budget `max_kl` is."""

    def __init__(self, cfg: ReinforceConfig) -> None:
        self._loop = cfg.trainer.ppo
        self._gain = cfg.responses_per_step / self._loop.kl_horizon
        self.penalty = self._loop.initial_policy_kl_penalty
        self._ended_at: float | None = None  # the KL that was above max_kl

    @property
    def spent(self) -> bool:
        """Whether a step's responses were further from the initial policy than `max_kl`."""
        return self._ended_at is not None

    def figures(self) -> dict[str, float]:
        """β, where it changes."""
        return {} if self._loop.kl_target is None else {"initial_policy_kl_penalty": self.penalty}

    def observe(self, step: int, kl: float | None) -> None:
        """Take in the mean KL of the responses of `step`, None where it is not measured."""
        if kl is None:
            return
        if self._loop.kl_target is not None:
            self.penalty = next_kl_penalty(self.penalty, kl, self._loop.kl_target, self._gain)
        if self._loop.max_kl is not None and kl > self._loop.max_kl:
            self._ended_at = kl
            log.info("step %d: %s: nothing is learned from it, and training ends", step, self._said(kl))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"kl_penalty": self.penalty, "ended_at_kl": self._ended_at}

    def load(self, state: Mapping[str, Any]) -> None:
        """As `state` left it; a run that ended goes on where `max_kl` has been raised since, or taken away."""
        self.penalty = state.get("kl_penalty", self.penalty)  # earlier versions had no need to keep it
        ended_at, limit = state.get("ended_at_kl"), self._loop.max_kl
        if ended_at is None or limit is None or ended_at <= limit:
            return
        self._ended_at = ended_at
        log.info("%s: training is finished after step %d; a larger one goes on", self._said(ended_at), state["step"])

    def _said(self, kl: float) -> str:
        return f"a KL of {kl:.4g} is above trainer.ppo.max_kl={self._loop.max_kl:g}"
