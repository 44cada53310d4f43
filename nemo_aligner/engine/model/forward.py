"""Forward and backward passes over micro-batches, through Megatron's schedules (any TP, PP).

rows ─▶ one stream, what they share once ─▶ model ─▶ output by rows ─▶ objective ─▶ LossTerms
                                                     (logprobs `[B, S]` of a policy, rewards `[B, K]` of a reward model)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor, nn

from nemo_aligner.algorithms.shared_prefix import MIN_SHARED, lay_out
from nemo_aligner.engine.interfaces import Microbatch, Objective
from nemo_aligner.engine.model.attention import StreamParams
from nemo_aligner.engine.model.context import context_part, of_all_ranks, places_multiple
from nemo_aligner.engine.model.experts import RowsOfPlaces
from nemo_aligner.engine.model.libraries import FP8_MULTIPLE
from nemo_aligner.engine.model.logprobs import TokenLogprobs

T = TypeVar("T")


def wanted_positions(microbatch: Microbatch) -> Tensor:
    """Where the next token's log-probability is asked for, `[B, S]` bool: before every target of `loss_mask`.

    Without a mask everywhere but at a row's end. Never empty: fillers ask for one that no mask counts.
    """
    tokens, mask = microbatch.tokens, microbatch.fields.get("loss_mask")
    wanted = torch.arange(1, tokens.size(1) + 1, device=tokens.device) < microbatch.lengths[:, None]
    if mask is not None:
        wanted[:, :-1] &= mask[:, 1:] != 0
    wanted[0, 0] |= ~wanted.any()
    return wanted


def token_logprobs(logits: Tensor, targets: Tensor, wanted: Tensor, vocab_size: int) -> Tensor:
    """Log-probability of the token after every wanted position, at that token: `[B, S]` float32, 0 elsewhere.

    logits: `[1, N, V/TP]` of the N wanted positions, this rank's part of the padded vocabulary; rows past `vocab_size`
    get no probability mass. targets: `[N]` int64, the tokens after them. wanted: `[B, S]` bool.
    """
    found = TokenLogprobs.apply(logits.squeeze(0), targets, vocab_size)
    return torch.zeros(wanted.shape, device=wanted.device).masked_scatter(wanted.roll(1, dims=1), found)


@dataclass(frozen=True)
class _Stream:
    """A micro-batch on the device, as rows and as the stream that goes through the model."""

    rows: Microbatch
    params: StreamParams
    wanted: Tensor  # as `wanted_positions`, of this rank's places
    places: Tensor  # `[N]`: those of the wanted positions, among this rank's; a prefix's last for each of its rows
    targets: Tensor  # `[N]`: the tokens after them
    ends: Tensor  # `[B]`: the places of the rows' last tokens, among this rank's; −1 for another's

    def output(self, model: nn.Module, raw: Tensor, vocab_size: int) -> Tensor:
        """The model's output by rows, from its `raw` one by this rank's places; all that share them get the same."""
        if unwrap_model(model).gives_rewards:
            found = raw.squeeze(0).index_select(0, self.ends.clamp(min=0)).masked_fill(self.ends[:, None] < 0, 0)
        else:
            # sequence parallelism cuts the stream until after the output layer, which then is of every place
            logits = raw[:, self.places] if self.params.wanted is None else raw
            found = token_logprobs(logits, self.targets, self.wanted, vocab_size)
        return found if self.params.part is None else self.params.part.sum(found)


def has_dropout(model: nn.Module) -> bool:
    """Whether training of `model` drops anything out."""
    config, adapters = get_model_config(model), unwrap_model(model).adapters
    return config.hidden_dropout > 0 or config.attention_dropout > 0 or (adapters is not None and adapters.dropout > 0)


def _stream(microbatch: Microbatch, model: nn.Module) -> _Stream:
    """All that is to be found out of a micro-batch is found out here, before the device has to be waited for."""
    device, config = next(model.parameters()).device, get_model_config(model)
    multiple = places_multiple() * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    multiple *= FP8_MULTIPLE if config.fp8 else 1
    # dropout is drawn for every row anew, and what is shared would have one draw for all
    alone = model.training and has_dropout(model)
    tokens = [row[:length] for row, length in zip(microbatch.tokens.tolist(), microbatch.lengths.tolist(), strict=True)]
    layout = lay_out(tokens, minimum=sys.maxsize if alone else MIN_SHARED, multiple=multiple)
    part, wanted = context_part(layout), wanted_positions(microbatch)
    own = layout.places if part is None else part.local[layout.places]
    wanted[:, : own.size(1)] &= own >= 0
    places = own[wanted[:, : own.size(1)]].to(device)
    targets = microbatch.tokens.roll(-1, dims=1)[wanted].to(device)
    ends = own[torch.arange(len(own)), microbatch.lengths - 1].to(device)
    longest = int(layout.positions.max()) + 1
    on_device = None if part is None else part.to(device)
    fields = {name: value.to(device) for name, value in microbatch.fields.items()}
    rows = Microbatch(microbatch.tokens.to(device), microbatch.lengths.to(device), fields)
    params = StreamParams(layout.to(device), None if config.sequence_parallel else places, longest, on_device)
    params.members = _members(rows, params, model)
    return _Stream(rows, params, wanted.to(device), places, targets, ends)


def _members(rows: Microbatch, params: StreamParams, model: nn.Module) -> RowsOfPlaces | None:
    """Whose this rank's places are, with what each row counts for in the objective; None where routers add no loss."""
    losses, fields, layout = unwrap_model(model).router_losses, rows.fields, params.layout
    if losses is None or not (losses.asked and fields and model.training and torch.is_grad_enabled()):
        return None
    own = torch.arange(len(layout.tokens), device=layout.tokens.device) if params.part is None else params.part.own
    if get_model_config(model).sequence_parallel:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        own = own.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
    if unwrap_model(model).gives_rewards:
        counts, rows_of_one = fields["weights"], 2
    else:
        counts, rows_of_one = fields["targets"] if "targets" in fields else fields["loss_mask"].sum(1), 1
    return RowsOfPlaces.of(layout.places, rows.lengths, counts, len(layout.tokens), own, rows_of_one)


def _run(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    on_raw: Callable[[Tensor, _Stream, bool], Callable[..., Any]],
    *,
    forward_only: bool,
    collect: bool,
) -> list[Any]:
    """Megatron's schedule over the micro-batches; what the loss function returned, on the last stage.

    `on_raw(raw model output, micro-batch, whether it is this rank's)` gives Megatron's loss function. With context
    parallelism the ranks of a group compute the micro-batches of all of them, together; each answers for its own.
    """
    losses, asked = unwrap_model(model).router_losses, list(microbatches)
    if collect and losses is not None:
        asked += [_FILLER] * (_most_of_expert_ranks(len(asked)) - len(asked))
    everyones, own = of_all_ranks(asked)
    if not everyones:
        return []
    streams = [_stream(microbatch, model) for microbatch in everyones]
    is_own: list[bool | None] = [False] * len(streams)
    is_own[own] = [True] * len(asked)
    chunks, ranks = list(unwrap_model(model).chunks), parallel_state.get_pipeline_model_parallel_world_size()
    if len(chunks) > 1 and len(streams) % ranks:  # the interleaved schedule takes as many at a time
        missing = ranks - len(streams) % ranks
        streams += [_stream(_FILLER, model)] * missing
        is_own += [None] * missing
    data = [zip(streams, is_own, strict=True) for _ in chunks]

    def forward_step(
        data: Iterator[tuple[_Stream, bool | None]], chunk: nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        stream, mine = next(data)
        params = stream.params
        # no mask: attention takes the layout
        raw = chunk(params.tokens[None], params.positions[None], None, packed_seq_params=params)
        return raw, _counting_nothing(raw) if mine is None else on_raw(raw, stream, mine)

    results = get_forward_backward_func(ranks, len(chunks) if len(chunks) > 1 else None)(
        forward_step_func=forward_step,
        data_iterator=data if len(chunks) > 1 else data[0],
        model=chunks,
        num_microbatches=len(streams),
        seq_length=max(len(stream.params.layout.tokens) for stream in streams),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    members = [stream.params.members for stream in streams if stream.params.members is not None]
    if losses is not None and members:  # every stage has some of them, and results only the last
        results = [found | more for found, more in zip(results, losses.sums(members), strict=False)]
    return results[own][: len(microbatches)]


_FILLER = Microbatch(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))


def _counting_nothing(raw: Tensor) -> Callable[..., Any]:
    """Megatron's loss function of a filler."""

    def loss_function(_: Tensor, non_loss_data: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return raw.sum() * 0, torch.zeros((), dtype=torch.int, device=raw.device), {}

    return loss_function


def _most_of_expert_ranks(count: int) -> int:
    """The largest `count` of the ranks that compute experts together, which need as many micro-batches each."""
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() == 1:
        return count
    found = torch.tensor([count], device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(found.item())


def from_last_stage(value: T) -> T:
    """`value` as the last pipeline stage has it, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast_object_list(box, source, group=group)
    return box[0]


def run_objective(
    model: nn.Module, microbatches: Sequence[Microbatch], objective: Objective, vocab_size: int, *, forward_only: bool
) -> list[dict[str, float]]:
    """Loss (and gradient, into the model's buffers) of each micro-batch.

    Returns per micro-batch {"loss": Σ, "count": n, metric: Σ, ...}, the same on every rank of the replica.
    """

    def on_raw(raw: Tensor, stream: _Stream, mine: bool) -> Callable[..., Any]:
        def loss_function(_: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            terms = objective(stream.output(model, raw, vocab_size), stream.rows)
            sums = {"loss": terms.loss_sum, "count": terms.count, **terms.metrics}
            counted = terms.count.int() * mine  # Megatron adds it up over the group, whose ranks have the same
            return terms.loss_sum, counted, {name: value.detach() for name, value in sums.items()}

        return loss_function

    return from_last_stage(_fetched(_run(model, microbatches, on_raw, forward_only=forward_only, collect=False)))


def _fetched(sums: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Scalars from the device, all at once."""
    values = [value.double() for part in sums for value in part.values()]
    numbers = iter(torch.stack(values).tolist() if values else ())
    return [{name: next(numbers) for name in part} for part in sums]


@torch.no_grad()
def forward_outputs(model: nn.Module, microbatches: Sequence[Microbatch], vocab_size: int) -> list[Tensor]:
    """Logprobs `[B, S]` or rewards `[B, K]` of each micro-batch, float32, on every stage; no gradient."""

    def on_raw(raw: Tensor, stream: _Stream, mine: bool) -> Callable[..., Any]:
        return lambda _, non_loss_data: stream.output(model, raw, vocab_size).cpu()

    return from_last_stage(_run(model, microbatches, on_raw, forward_only=True, collect=True))
