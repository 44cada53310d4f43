"""Drawing the next token: one pure function per rule of the field.

Notation: B rows, V vocabulary. Logits are `[B, V]` float32, and every filter returns the same shape with the excluded
entries at -inf, so filters compose by application.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EOS_ALIAS = "<|endoftext|>"
"""An end string that always means the tokenizer's own EOS, whatever that token is called."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn (`inference.*` of the sampler's YAML)."""

    greedy: bool = False  # argmax; temperature, top_k, top_p and repetition_penalty are then not used
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1.0 or 0.0 = off; the token that crosses the threshold is kept
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already in the row
    min_tokens: int = 0  # EOS and stop tokens cannot be drawn before this many response tokens
    max_tokens: int = 30  # response tokens at most, of each sample by itself
    end_strings: tuple[str, ...] = ()  # the response ends before the first of these; "<|endoftext|>" means EOS.
    # One that ends within the first min_tokens - 1 tokens is text like any other
    seed: int = 1234
    top_logprobs: int = 0  # the likeliest tokens that are reported with each one drawn

    @property
    def filters(self) -> bool:
        """True when tokens are drawn from something else than softmax(logits / temperature)."""
        return self.greedy or self.top_k > 0 or 0.0 < self.top_p < 1.0 or self.repetition_penalty != 1.0

    @property
    def changes_distribution(self) -> bool:
        """True when tokens are not drawn from the model's own distribution."""
        return self.filters or self.temperature != 1.0


class Drawn(NamedTuple):
    """One token per row: ids `[B]` int64 and two log-probabilities `[B]` float32."""

    tokens: Tensor
    logprobs: Tensor  # under the model: log_softmax of the logits as they came
    sampling_logprobs: Tensor  # under the distribution drawn from (temperature, filters, penalty); 0 when greedy


def repetition_penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of tokens already in the row made less likely (CTRL, arXiv 1909.05858, section 4.1).

    l' = l / penalty where l > 0, l · penalty otherwise, for tokens with `seen` `[B, V]` bool true.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k_filtered(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row; ties with the k-th are kept."""
    if k <= 0 or k >= logits.size(-1):
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def top_p_filtered(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p (arXiv 1904.09751).

    A token stays when the probability of all strictly more likely ones before it is still below p, so the token that
    crosses the threshold is kept, and at least one always is.
    """
    if not 0.0 < p < 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    drop = probs.cumsum(dim=-1) - probs >= p
    drop[..., 0] = False  # a p below float32's smallest number is 0 here
    return logits.scatter(-1, order, ordered.masked_fill(drop, -torch.inf))


def uniform_noise(
    seeds: int | np.ndarray, prompts: np.ndarray, samples: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """One number in (0, 1) per row, a function of (seed, prompt index, sample index, token position) alone.

    `seeds` is one for all rows or one for each.

    So a sample is the same whatever shares its batch, whichever rank draws it, and after any interruption.
    Chained SplitMix64 finalisers (Steele, Lea, Flood 2014), float64 `[B]` from int64 `[B]` arrays.
    """
    with np.errstate(over="ignore"):  # the mixing is arithmetic modulo 2^64
        state: np.ndarray = np.full(len(prompts), seeds).astype(np.uint64)
        for part in (prompts, samples, positions):
            state = _splitmix64(state + np.uint64(0x9E3779B97F4A7C15)) ^ part.astype(np.int64).astype(np.uint64)
        state = _splitmix64(_splitmix64(state))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _splitmix64(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_BLOCK = 256
"""Tokens whose probability is summed together before a single one is looked for."""

_CPU_CHUNK = 1 << 19
"""Logits drawn from together on a CPU: they stay in its cache, which makes the passes over them many times as fast."""


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Token whose interval of the cumulative distribution holds `uniform`, and the log of its probability.

    With F the cumulative sum of softmax(logits), the token is min {v : F(v) > u·F(V-1)}: each is drawn with its
    probability. Found in two steps, the block of tokens and then the token in it, so only one block per row is summed
    in float64. `logits` `[B, V]` float32, `uniform` `[B]` float64 in (0, 1); returns ids `[B]` int64 and `[B]` float32.
    """
    probs = logits.softmax(dim=-1)
    if probs.size(-1) % _BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -probs.size(-1) % _BLOCK))
    blocks = probs.view(len(probs), -1, _BLOCK)
    sums = blocks.sum(dim=-1).double()
    block, within = _first_above(sums, uniform.to(sums))
    chosen = blocks.take_along_dim(block[:, None, None], dim=1).squeeze(1)
    token, _ = _first_above(chosen.double(), within)
    return block * _BLOCK + token, _at(chosen, token).log()


def _first_above(weights: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative sum exceeds `fraction` of the total, and how far into its weight that lies.

    weights `[B, n]` ≥ 0 and fraction `[B]`, float64; returns `[B]` int64 and `[B]` float64 in [0, 1).
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # fraction·total may round up to total, which would fall past the last index that has any weight
    target = torch.minimum(fraction.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    weight = weights.gather(-1, index)
    into = ((target - (cumulative.gather(-1, index) - weight)) / weight).clamp(0.0, 1.0)
    return index.squeeze(-1), into.squeeze(-1)


def likeliest(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Of each row of `logprobs` `[N, V]` the `count` likeliest tokens with theirs, the likeliest first."""
    values, tokens = logprobs.topk(min(count, logprobs.size(-1)), dim=-1)
    return [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]


def draw(
    logits: Tensor,
    params: SamplingParams,
    uniform: Tensor | None,
    seen: Tensor | None = None,
    forbidden: tuple[Tensor, Tensor] | None = None,
) -> Drawn:
    """Draw one token per row.

    Args:
        logits: `[B, V]` floating.
        uniform: `[B]` in (0, 1), one number per row; not used when greedy.
        seen: `[B, V]` bool, tokens already in the row; needed when `repetition_penalty` is not 1.
        forbidden: `[B]` bool, the rows in which the tokens of ids `[m]` int64 cannot be drawn; the model's own
            log-probability of what is drawn does not know of it.
    """
    rows, vocabulary = logits.shape
    together = max(1, _CPU_CHUNK // vocabulary) if logits.device.type == "cpu" else rows
    if rows <= together:
        return _draw(logits, params, uniform, seen, forbidden)
    parts = []
    for start in range(0, rows, together):
        part = slice(start, start + together)
        parts.append(
            _draw(
                logits[part],
                params,
                None if uniform is None else uniform[part],
                None if seen is None else seen[part],
                None if forbidden is None else (forbidden[0][part], forbidden[1]),
            )
        )
    return Drawn(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _draw(
    logits: Tensor,
    params: SamplingParams,
    uniform: Tensor | None,
    seen: Tensor | None,
    forbidden: tuple[Tensor, Tensor] | None,
) -> Drawn:
    """`draw` of a few rows."""
    logits = logits.float()
    shaped = logits
    if forbidden is not None:
        shaped = logits.clone()
        shaped[:, forbidden[1]] = shaped[:, forbidden[1]].masked_fill(forbidden[0][:, None], -torch.inf)
    if params.greedy:
        tokens = shaped.argmax(dim=-1)
        chosen = _at(logits, tokens) - logits.logsumexp(dim=-1)
        return Drawn(tokens, chosen, torch.zeros_like(chosen))
    assert uniform is not None
    if params.repetition_penalty != 1.0:
        assert seen is not None
        shaped = repetition_penalised(shaped, seen, params.repetition_penalty)
    if params.temperature != 1.0:
        shaped = shaped / params.temperature
    shaped = top_p_filtered(top_k_filtered(shaped, params.top_k), params.top_p)
    tokens, drawn_from = inverse_cdf(shaped, uniform)
    if shaped is logits:
        return Drawn(tokens, drawn_from, drawn_from)
    return Drawn(tokens, _at(logits, tokens) - logits.logsumexp(dim=-1), drawn_from)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Each row's entry at its index, `[B]`."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)
