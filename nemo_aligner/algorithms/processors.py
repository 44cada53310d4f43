"""What becomes of scored samples: rejection sampling, ReST, decision transformer, or nothing.

Every processor is a pure function of the whole list; rows keep the order of their first appearance. Samples are looked
at one at a time, and what is chosen of them again when asked for: a list may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.records import Keys, ScoredSample

log = logging.getLogger(__name__)

PROCESSORS = ("rs", "rest", "dt")


class Chosen(Sequence[ScoredSample]):
    """Some of `samples`, by their indices, each after `change`."""

    def __init__(
        self,
        samples: Sequence[ScoredSample],
        indices: Iterable[int],
        change: Callable[[ScoredSample], ScoredSample] = lambda sample: sample,
    ) -> None:
        self._samples, self._indices, self._change = samples, array("q", indices), change

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._change(self._samples[self._indices[index]])


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
) -> Sequence[ScoredSample]:
    """Process `samples` with `rs`, `rest`, `dt` or null. Raises DataError when nothing is left."""
    check_processor(name, reward_template, keys)
    if name == "rs":
        return best_of_group(samples)
    if name == "rest":
        return above_threshold(samples, threshold)
    if name == "dt":
        known = with_rewards(samples)
        return Chosen(known, range(len(known)), lambda sample: with_reward_prompt(sample, reward_template, keys))
    return samples


def best_of_group(samples: Sequence[ScoredSample]) -> Sequence[ScoredSample]:
    """Rejection sampling (Llama 2, arXiv 2307.09288, section 3.2.3): the best sample of each distinct input.

    Ties go to the first; NaN never wins; an input whose rewards are all NaN is left out.
    """
    best: dict[bytes, tuple[int, float]] = {}
    for index, sample in enumerate(samples):
        group = hashlib.blake2b(sample.prompt_id.encode(), digest_size=16).digest()  # prompts may be long
        kept = best.get(group)
        if kept is None or math.isnan(kept[1]) or sample.reward > kept[1]:
            best[group] = index, sample.reward
    result = [index for index, reward in best.values() if not math.isnan(reward)]
    if len(result) < len(best):
        log.warning("rs: %d inputs left out, all their rewards are NaN", len(best) - len(result))
    if not result:
        raise DataError("processor=rs leaves no sample: every reward is NaN")
    return Chosen(samples, result)


def above_threshold(samples: Sequence[ScoredSample], threshold: float) -> Sequence[ScoredSample]:
    """ReST's Improve step (arXiv 2308.08998, section 3): samples with reward strictly above the threshold."""
    rewards = array("d", (sample.reward for sample in samples))
    kept = [index for index, reward in enumerate(rewards) if reward > threshold]
    if not kept:
        known = [reward for reward in rewards if not math.isnan(reward)]
        span = f"between {min(known):.4g} and {max(known):.4g}" if known else "all NaN"
        raise DataError(f"threshold={threshold:g} leaves no sample: the {len(samples)} rewards are {span}")
    return Chosen(samples, kept)


def with_rewards(samples: Sequence[ScoredSample]) -> Sequence[ScoredSample]:
    """Those whose reward is known. Raises DataError when there are none."""
    kept = [index for index, sample in enumerate(samples) if not math.isnan(sample.reward)]
    if len(kept) < len(samples):
        log.warning("dt: %d samples left out, their rewards are NaN", len(samples) - len(kept))
    if not kept:
        raise DataError("processor=dt leaves no sample: every reward is NaN")
    return Chosen(samples, kept)


def with_reward_prompt(sample: ScoredSample, template: str, keys: Keys) -> ScoredSample:
    """Decision transformer (arXiv 2308.12050): the reward, to one decimal, becomes part of the prompt.

    Of a conversation, of the turn that is answered. Plain replacement, the reward first, so that `{reward}` inside a
    user's text stays as it is.
    """
    with_reward = template.replace(f"{{{keys.reward}}}", f"{sample.reward:.1f}")
    return sample.with_input(with_reward.replace(f"{{{keys.input}}}", sample.input))
