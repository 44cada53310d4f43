"""What becomes of scored samples: rejection sampling, ReST, decision transformer, or nothing.

Every processor is a pure function of the whole list; rows keep the order of their first appearance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.records import Keys, ScoredSample

log = logging.getLogger(__name__)

PROCESSORS = ("rs", "rest", "dt")


def check_processor(name: str | None, reward_template: str, keys: Keys) -> None:
    """Refuse an unknown processor or an unusable template before any work is done. Raises ConfigError."""
    if name is not None and name not in PROCESSORS:
        raise ConfigError(f"{name!r} is not one of {', '.join(PROCESSORS)}, null", "processor")
    if name == "dt":
        missing = [f"{{{key}}}" for key in (keys.input, keys.reward) if f"{{{key}}}" not in reward_template]
        if missing:
            raise ConfigError(f"{reward_template!r} lacks {' and '.join(missing)}", "reward_template")


def apply_processor(
    name: str | None, samples: Sequence[ScoredSample], *, threshold: float, reward_template: str, keys: Keys
) -> list[ScoredSample]:
    """Process `samples` with `rs`, `rest`, `dt` or null. Raises DataError when nothing is left."""
    check_processor(name, reward_template, keys)
    if name == "rs":
        return best_of_group(samples)
    if name == "rest":
        return above_threshold(samples, threshold)
    if name == "dt":
        return [with_reward_prompt(sample, reward_template, keys) for sample in with_rewards(samples)]
    return list(samples)


def best_of_group(samples: Sequence[ScoredSample]) -> list[ScoredSample]:
    """Rejection sampling (Llama 2, arXiv 2307.09288, section 3.2.3): the best sample of each distinct input.

    Ties go to the first; NaN never wins; an input whose rewards are all NaN is left out.
    """
    best: dict[str, ScoredSample] = {}
    for sample in samples:
        kept = best.get(sample.prompt_id)
        if kept is None or math.isnan(kept.reward) or sample.reward > kept.reward:
            best[sample.prompt_id] = sample
    result = [sample for sample in best.values() if not math.isnan(sample.reward)]
    if len(result) < len(best):
        log.warning("rs: %d inputs left out, all their rewards are NaN", len(best) - len(result))
    if not result:
        raise DataError("processor=rs leaves no sample: every reward is NaN")
    return result


def above_threshold(samples: Sequence[ScoredSample], threshold: float) -> list[ScoredSample]:
    """ReST's Improve step (arXiv 2308.08998, section 3): samples with reward strictly above the threshold."""
    kept = [sample for sample in samples if sample.reward > threshold]
    if not kept:
        rewards = [sample.reward for sample in samples if not math.isnan(sample.reward)]
        span = f"between {min(rewards):.4g} and {max(rewards):.4g}" if rewards else "all NaN"
        raise DataError(f"threshold={threshold:g} leaves no sample: the {len(samples)} rewards are {span}")
    return kept


def with_rewards(samples: Sequence[ScoredSample]) -> list[ScoredSample]:
    """Those whose reward is known. Raises DataError when there are none."""
    kept = [sample for sample in samples if not math.isnan(sample.reward)]
    if len(kept) < len(samples):
        log.warning("dt: %d samples left out, their rewards are NaN", len(samples) - len(kept))
    if not kept:
        raise DataError("processor=dt leaves no sample: every reward is NaN")
    return kept


def with_reward_prompt(sample: ScoredSample, template: str, keys: Keys) -> ScoredSample:
    """Decision transformer (arXiv 2308.12050): the reward, to one decimal, becomes part of the prompt.

    Of a conversation, of the turn that is answered. Plain replacement, the reward first, so that `{reward}` inside a
    user's text stays as it is.
    """
    with_reward = template.replace(f"{{{keys.reward}}}", f"{sample.reward:.1f}")
    return sample.with_input(with_reward.replace(f"{{{keys.input}}}", sample.input))
