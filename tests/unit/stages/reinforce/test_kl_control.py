"""β over a run and the end of a run by its KL; what a checkpoint keeps of them."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.stages.reinforce.kl_control import KLControl


def control(**keys: Any) -> KLControl:
    cfg = ReinforceConfig()
    cfg.model.ppo.num_rollout_samples, cfg.model.ppo.num_rollout_per_prompt = 50, 4
    for name, value in {"initial_policy_kl_penalty": 0.1, **keys}.items():
        setattr(cfg.trainer.ppo, name, value)
    return KLControl(cfg)


def test_the_gain_is_the_part_of_the_horizon_that_a_step_covers() -> None:
    found = control(kl_target=2.0, kl_horizon=1000)
    found.observe(1, 2.2)
    assert found.penalty == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert found.figures() == {"initial_policy_kl_penalty": found.penalty}


def test_without_a_target_the_coefficient_stays_and_is_no_figure() -> None:
    found = control()
    found.observe(1, 1e6)
    assert (found.penalty, found.spent, found.figures()) == (0.1, False, {})


def test_a_resumed_controller_goes_on_as_one_that_was_never_stopped() -> None:
    kls = [0.1, 3.0, 2.5, 1.9, 7.0]
    whole, first = control(kl_target=2.0), control(kl_target=2.0)
    for step, kl in enumerate(kls):
        whole.observe(step, kl)
        if step < 3:
            first.observe(step, kl)
    second = control(kl_target=2.0)
    second.load(json.loads(json.dumps(first.state())))
    for kl in kls[3:]:
        second.observe(0, kl)
    assert second.penalty == whole.penalty != 0.1


def test_the_budget_is_spent_above_it_and_a_larger_one_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = control(max_kl=2.0)
    found.observe(1, 2.0)
    assert not found.spent
    found.observe(2, 2.5)
    assert found.spent
    state = {"step": 2, **found.state()}
    said = "a KL of 2.5 is above trainer.ppo.max_kl=2"
    assert [record.message for record in caplog.records] == [
        f"step 2: {said}: nothing is learned from it, and training ends"
    ]
    caplog.clear()
    for limit, spent in ((2.0, True), (2.5, False), (None, False)):
        again = control(max_kl=limit)
        again.load(state)
        assert again.spent is spent
    assert [record.message for record in caplog.records] == [
        f"{said}: training is finished after step 2; a larger one goes on"
    ]


def test_a_checkpoint_without_a_word_of_it_is_gone_on_from() -> None:
    found = control(kl_target=2.0, max_kl=5.0)
    found.load({"step": 3})
    assert (found.penalty, found.spent) == (0.1, False)
