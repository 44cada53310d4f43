"""Token drawing against its definitions: brute force over small vocabularies, chi-square for frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nemo_aligner.algorithms.sampling import (
    SamplingParams,
    draw,
    inverse_cdf,
    likeliest,
    repetition_penalised,
    top_k_filtered,
    top_p_filtered,
    uniform_noise,
)
from nemo_aligner.config.schema import LEAST_TEMPERATURE, PENALTIES

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.5, -3.0]])


def noise(rows: int, seed: int = 7) -> torch.Tensor:
    index = np.arange(rows)
    return torch.from_numpy(uniform_noise(seed, index // 16, index % 16, np.zeros(rows, dtype=np.int64)))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.4, top_k=4, top_p=0.9),
    ],
    ids=str,
)
def test_frequencies_are_the_filtered_and_renormalised_probabilities(params: SamplingParams) -> None:
    rows = 40_000
    drawn = draw(LOGITS.expand(rows, -1), params, noise(rows))
    expected = brute_force_probabilities(LOGITS[0].tolist(), params)
    counts = np.bincount(drawn.tokens.numpy(), minlength=5)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible] * rows).pvalue > 1e-3
    torch.testing.assert_close(
        drawn.sampling_logprobs.exp(), torch.from_numpy(expected).float()[drawn.tokens], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(drawn.logprobs, LOGITS[0].log_softmax(-1)[drawn.tokens])


def brute_force_probabilities(logits: list[float], params: SamplingParams) -> np.ndarray:
    """The textbook definition, token by token."""
    scaled = [x / params.temperature for x in logits]
    kept = set(range(len(scaled)))
    if params.top_k:
        kth = sorted(scaled, reverse=True)[params.top_k - 1]
        kept = {i for i in kept if scaled[i] >= kth}
    total = sum(np.exp(scaled[i]) for i in kept)
    if 0 < params.top_p < 1:
        mass, nucleus = 0.0, set()
        for i in sorted(kept, key=lambda i: (-scaled[i], i)):
            if mass >= params.top_p:
                break
            nucleus.add(i)
            mass += np.exp(scaled[i]) / total
        kept = nucleus
    total = sum(np.exp(scaled[i]) for i in kept)
    return np.array([np.exp(scaled[i]) / total if i in kept else 0.0 for i in range(len(scaled))])


def test_greedy_ignores_everything_but_the_logits() -> None:
    odd = SamplingParams(greedy=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=9.0)
    assert draw(LOGITS, odd, None).tokens.tolist() == [0]


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = top_p_filtered(probs.log(), 0.6).isfinite()
    assert kept.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("p", [1e-6, 1e-46, 1e-50, 5e-324])
def test_top_p_always_keeps_the_likeliest_token(p: float) -> None:
    assert top_p_filtered(LOGITS, p)[0].isfinite().tolist() == [True, False, False, False, False]
    assert draw(LOGITS.expand(9, -1), SamplingParams(top_p=p), noise(9)).tokens.tolist() == [0] * 9


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_furthest_penalty_at_the_least_temperature_leaves_a_token_to_draw(penalty: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, temperature=LEAST_TEMPERATURE)
    logits, seen = LOGITS * 1000, torch.tensor([[True, False, True, False, False]])
    expected = [0] if penalty < 1 else [3]  # 2000 / 100 is below the 500 that was not seen
    assert draw(logits, params, noise(1), seen).tokens.tolist() == expected


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_top_p_off_keeps_all(p: float) -> None:
    assert top_p_filtered(LOGITS, p).equal(LOGITS)
    steep = torch.tensor([[50.0, 0.0]])  # the likelier one's probability is rounded to 1
    assert top_p_filtered(steep, p).equal(steep)


@pytest.mark.parametrize(("k", "kept"), [(1, [0]), (2, [0, 2, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_largest_and_the_equals_of_the_last_of_them(k: int, kept: list[int]) -> None:
    found = top_k_filtered(LOGITS, k)[0]
    assert found.isfinite().nonzero()[:, 0].tolist() == kept
    assert found[kept].equal(LOGITS[0, kept])


@pytest.mark.parametrize("k", [0, -1, 5, 99])
def test_top_k_off_or_larger_than_the_vocabulary_keeps_all(k: int) -> None:
    assert top_k_filtered(LOGITS, k).equal(LOGITS)


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    seen = torch.tensor([[True, True, False, False, False]])
    after = repetition_penalised(LOGITS, seen, 2.0)
    assert after.tolist() == [[1.0, -2.0, 0.5, 0.5, -3.0]]


def test_noise_depends_on_seed_prompt_sample_and_position_alone() -> None:
    prompts, samples, positions = np.array([3, 3, 4]), np.array([0, 1, 0]), np.array([5, 5, 5])
    together = uniform_noise(1, prompts, samples, positions)
    alone = [uniform_noise(1, prompts[i : i + 1], samples[i : i + 1], positions[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == alone
    assert len({*together, uniform_noise(2, prompts, samples, positions)[0]}) == 4


def test_noise_is_uniform_and_uncorrelated_between_neighbours() -> None:
    index = np.arange(60_000)
    values = uniform_noise(1234, index // 100, index % 10, index % 7 + index // 10 % 10)
    grid = uniform_noise(0, np.repeat(np.arange(250), 250), np.zeros(62_500, int), np.tile(np.arange(250), 250))
    assert stats.kstest(grid, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(grid[:-1], grid[1:])[0, 1]) < 0.02
    assert 0 < values.min() < values.max() < 1


MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(z: int) -> int:
    """SplitMix64's finaliser in whole numbers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_noise_is_the_published_mixing_of_its_four_numbers() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of the generator seeded with 1234567
    assert [mixed(1234567 + n * GOLDEN & MASK) for n in (1, 2, 3)] == published
    rows = [(1234, 0, 0, 0), (-5, 7, 2, 9), (2**62, 2**40, 3, 4095)]
    for seed, *parts in rows:
        state = seed & MASK
        for part in parts:
            state = mixed((state + GOLDEN) & MASK) ^ part
        wanted = ((mixed(mixed(state)) >> 11) + 0.5) / 2**53
        assert uniform_noise(seed, *(np.array([part]) for part in parts)).tolist() == [wanted]


@pytest.mark.parametrize("u", [1e-17, 0.5, 1 - 2**-53])
def test_inverse_cdf_never_draws_a_token_without_probability(u: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    token, _ = inverse_cdf(logits, torch.tensor([u], dtype=torch.float64))
    assert token.item() in (1, 3)


@pytest.mark.parametrize("vocabulary", [3, 256, 700, 1024])
def test_inverse_cdf_is_the_first_token_whose_cumulative_probability_exceeds_the_number(vocabulary: int) -> None:
    logits = 3 * torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, ::5] = -torch.inf
    uniform = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = inverse_cdf(logits, uniform)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    below = torch.where(tokens > 0, cumulative.gather(-1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert (below <= uniform + 1e-6).all()
    assert (uniform <= cumulative.gather(-1, tokens[:, None])[:, 0] + 1e-6).all()
    assert logits.gather(-1, tokens[:, None]).isfinite().all()
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("greedy", [False, True])
def test_a_forbidden_token_is_not_drawn_and_changes_no_log_probability_of_the_model(greedy: bool) -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    uniform = torch.tensor([0.3, 0.3], dtype=torch.float64)
    forbidden = (torch.tensor([False, True]), torch.tensor([0]))
    drawn = draw(logits, SamplingParams(greedy=greedy), uniform, forbidden=forbidden)
    assert drawn.tokens.tolist() == [0, 1]
    wanted = logits.log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, wanted)
    if not greedy:
        assert drawn.sampling_logprobs[1] == pytest.approx(torch.tensor([1.0, 0.0]).log_softmax(0)[0].item())


def test_rows_drawn_in_chunks_are_those_drawn_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 200_000, generator=generator)  # a chunk holds two such rows
    uniform = torch.rand(7, dtype=torch.float64, generator=generator)
    seen = torch.rand(7, 200_000, generator=generator) < 0.5
    forbidden = (torch.tensor([True, False] * 3 + [True]), torch.arange(100_000))
    params = SamplingParams(repetition_penalty=1.2, top_k=1000)
    together = draw(logits, params, uniform, seen, forbidden)
    assert [len(values) for values in together] == [7, 7, 7]
    assert draw(logits, SamplingParams(greedy=True), None).tokens.equal(logits.argmax(-1))
    for row in range(7):
        one = slice(row, row + 1)
        alone = draw(logits[one], params, uniform[one], seen[one], (forbidden[0][one], forbidden[1]))
        assert together.tokens[row] == alone.tokens[0]
        torch.testing.assert_close(together.logprobs[row], alone.logprobs[0])
        torch.testing.assert_close(together.sampling_logprobs[row], alone.sampling_logprobs[0])


@pytest.mark.parametrize(
    ("params", "filters", "changes"),
    [
        (SamplingParams(), False, False),
        (SamplingParams(temperature=0.5), False, True),
        (SamplingParams(greedy=True), True, True),
        (SamplingParams(top_k=1), True, True),
        (SamplingParams(top_p=0.0), False, False),
        (SamplingParams(top_p=0.01), True, True),
        (SamplingParams(top_p=1.0), False, False),
        (SamplingParams(repetition_penalty=1.1), True, True),
        (SamplingParams(repetition_penalty=0.9), True, True),
        (SamplingParams(min_tokens=3, max_tokens=9, end_strings=("x",), seed=5), False, False),
    ],
)
def test_what_changes_the_distribution_is_known(params: SamplingParams, filters: bool, changes: bool) -> None:
    assert (params.filters, params.changes_distribution) == (filters, changes)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_likeliest_tokens_come_with_their_figures_the_likeliest_first(count: int) -> None:
    logprobs = torch.tensor([[-3.0, -1.0, -2.0, -9.0, -5.0], [-1.0, -2.0, -3.0, -4.0, -5.0]])
    wanted = [sorted(enumerate(row), key=lambda pair: -pair[1])[:count] for row in logprobs.tolist()]
    assert likeliest(logprobs, count) == wanted


def test_rows_may_have_seeds_of_their_own() -> None:
    index = np.arange(4)
    together = uniform_noise(np.array([1, 2, 1, 2]), index, index, index)
    assert together.tolist() == [uniform_noise(1 + i % 2, index, index, index)[i] for i in range(4)]
