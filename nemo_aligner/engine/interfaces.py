"""What a stage may ask of a model, and nothing about how Megatron does it.

Notation: B rows (responses), S padded length, V vocabulary. Token ids are int64, log-probabilities and rewards float32.
Stages take these protocols, so a unit test may hand them a fake and a cluster a 70B model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_aligner.algorithms.sampling import SamplingParams
    from nemo_aligner.algorithms.terms import LossTerms

T = TypeVar("T")


class Cluster(Protocol):
    """The processes of this run, seen from one of them (rank layout: tensor × pipeline × data).

    Ranks that share long rows (context parallelism) count as data-parallel ones.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_main(self) -> bool:
        """True on rank 0 alone: the one that logs, merges and writes final files."""

    @property
    def speaks_for_replica(self) -> bool:
        """True on one rank of each data-parallel replica: the one that writes that replica's rows."""

    def barrier(self) -> None: ...

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""

    def gather(self, value: T) -> list[T]:
        """`value` of each data-parallel rank in order, the same list on every rank."""

    def gather_ranks(self, value: T) -> list[T]:
        """`value` of every rank in order, the same list on each."""

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on at least one."""

    def any_in_replica(self, flag: bool) -> bool:
        """The same among the ranks of this data-parallel replica alone."""


class Tokenizer(Protocol):
    vocab_size: int
    bos_id: int | None
    eos_id: int  # ends texts that are trained on
    pad_id: int
    stop_ids: frozenset[int]  # any of these ends a response: EOS, and others that the model has for it
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS; special tokens written in the text are recognised."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def piece(self, token: int) -> str:
        """What the vocabulary calls a token, special ones too."""


@dataclass(frozen=True)
class GenerationRequest:
    """One response to draw. Its noise depends on (seed, prompt_index, sample_index, token position) alone."""

    prompt_index: int
    sample_index: int
    prompt_tokens: tuple[int, ...]
    max_tokens: int | None = None  # response tokens at most, where fewer than the sampling parameters allow
    sampling: SamplingParams | None = None  # how this one is drawn, where not as the others
    scores_prompt: bool = False  # report the log-probabilities of the prompt's own tokens too
    streams: bool = False  # a desk wants to know its tokens as they are drawn
    uid: int = 0  # tells it from others where prompt and sample do not


TopLogprobs = list[tuple[int, float]]
"""The likeliest tokens of a position and their log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens but the first, each given those before it, and what was likeliest."""

    logprobs: list[float]
    top: list[TopLogprobs]


@dataclass(frozen=True)
class Response:
    """One drawn response."""

    prompt_index: int
    sample_index: int
    tokens: list[int]  # response tokens; the stopping token included when there was one
    text: str  # decoded from `tokens`, without the stopping token or end string
    logprobs: list[float]  # the model's own, temperature 1, nothing filtered
    sampling_logprobs: list[float]  # of the distribution the token was really drawn from
    finish_reason: str  # "stop" (EOS or an end string) or "length"
    top_logprobs: list[TopLogprobs] = field(default_factory=list)  # of each token, where they were asked for
    prompt_scores: PromptScores | None = None  # where they were asked for
    uid: int = 0  # that of the request


@dataclass(frozen=True)
class Progress:
    """A response that is being drawn, as far as it is: all of its tokens, named as in Response."""

    uid: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


@dataclass(frozen=True)
class Orders:
    """What a desk wants of the generation that is under way."""

    new: Sequence[GenerationRequest] = ()
    dropped: Sequence[int] = ()  # uids of requests that nobody waits for any more


class Desk(Protocol):
    """Where requests come in and responses go out while generation is under way; rank 0 has it."""

    def orders(self, *, idle: bool) -> Orders | None:
        """What came in since; None when generation should end. Where `idle`, nothing is being drawn: it may wait."""

    def drawn(self, progress: Sequence[Progress]) -> None:
        """What there is so far of the responses that got one token more and are not done, where requests stream."""

    def finished(self, response: Response) -> None:
        """A response that is done."""

    def failed(self, uids: Sequence[int]) -> None:
        """Requests that met a fault, and will have no response; the log says which."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did, averaged over the global batch."""

    loss: float
    grad_norm: float
    lr: float
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward pass, right-padded.

    tokens `[B, S]` int64; lengths `[B]` int64, true length of each row; `fields` holds whatever the loss needs,
    each tensor with first dimension B: `loss_mask` `[B, S]` float32 is 1 where the token AT that position is a target
    (position 0 never is); `advantages` `[B]` float32, and so on.
    """

    tokens: Tensor
    lengths: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)


Objective: TypeAlias = "Callable[[Tensor, Microbatch], LossTerms]"
"""Loss of one micro-batch as a sum and a count, from the model's output.

Output of a policy: logprobs `[B, S]`, entry (b, t) = log p(tokens[b, t] | tokens[b, :t]), 0 at t = 0.
Output of a reward model: rewards `[B, K]` float32, K attributes (1 for ranking)."""


class Saving(Protocol):
    """A checkpoint that is being written while the training goes on; nothing is there until `finish`."""

    def done(self) -> bool:
        """Whether every rank has written its part, so that `finish` will not wait; collective."""

    def finish(self) -> None:
        """Wait until it is written, and let it appear as a whole; collective.

        Raises OutputError on every rank where one could not write.
        """


class TrainableModel(Protocol):
    """A model with an optimizer: what the supervised and REINFORCE loops train."""

    @property
    def cluster(self) -> Cluster: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_sequence_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def train_step(self, microbatches: Sequence[Microbatch], objective: Objective) -> StepMetrics:
        """One optimizer step over this rank's micro-batches (same number on every rank).

        Gradient = d/dθ (Σ loss_sum / Σ count) with both sums over all micro-batches and data-parallel ranks.
        Raises TrainingError when loss or gradient is not finite (weights are then unchanged).
        """

    def evaluate(self, microbatches: Sequence[Microbatch], objective: Objective) -> StepMetrics:
        """The same averages without gradient or update (`grad_norm` and `lr` are 0)."""

    def save_training_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Weights, optimizer, schedule, RNG and `state` into `folder`; appears whole or not at all."""

    def save_in_background(self, folder: Path, state: dict[str, Any]) -> Saving:
        """The same of how everything is now, from a copy in the CPU's memory, while this goes on; one at a time."""

    def load_training_state(self, folder: Path) -> dict[str, Any]:
        """Restore what `save_training_state` wrote, at any TP/PP/DP; returns `state`."""

    def keep_chat_template(self, template: str) -> None:
        """Let Jinja `template` be the tokenizer's own, here and in the archive that `save_nemo` writes."""

    def save_nemo(self, path: Path, config_updates: dict[str, Any] | None = None) -> None:
        """Write the .nemo archive, with `config_updates` in its `model_config.yaml`; appears whole or not at all."""

    def archive_hash(self) -> str:
        """sha256 of the archive this model was loaded from."""


class Policy(TrainableModel, Protocol):
    def generate(
        self, requests: Iterable[GenerationRequest], sampling: SamplingParams, max_slots: int
    ) -> Iterator[Response]:
        """Draw every request of this replica, yielding each response as it finishes (any order)."""

    def serve(self, desk: Desk | None, max_slots: int) -> None:
        """Draw what `desk` orders until it has had enough; a request joins those being drawn at the next step.

        Collective: every rank of the one replica calls it, rank 0 with the desk. Requests bring their own `sampling`.
        Raises ServerError when it cannot go on.
        """

    def logprobs(
        self, rows: Sequence[Sequence[int]], micro_batch_size: int, starts: Sequence[int] | None = None
    ) -> list[Tensor]:
        """For each row of token ids (length L): `[L]` float32 log p(token | those before it), 0 at position 0.

        `starts` says from which token on they are needed in each row; those before may be 0. Ranks that share long rows
        ask together, each for its own, of which there may be none.
        """

    def initial_logprobs(
        self, rows: Sequence[Sequence[int]], micro_batch_size: int, starts: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The same under the weights that `keep_initial_weights` kept; of a model with an adapter, without it."""


class RewardModel(TrainableModel, Protocol):
    @property
    def append_eod(self) -> bool:
        """Whether the texts it was trained on ended with EOS."""

    @property
    def stored_standardization(self) -> tuple[float, float] | None:
        """Mean and std of its rewards on its validation data, where the archive holds them."""

    def score(self, rows: Sequence[Sequence[int]], micro_batch_size: int) -> list[list[float]]:
        """K rewards of each token row (K = 1 for ranking models), read at its last token; order of `rows` kept."""
