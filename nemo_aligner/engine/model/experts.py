"""Layers with experts: Megatron's mixture of experts with its dispatcher, and the losses of its router.

Notation: E experts, K of which a token goes to; row r of a micro-batch has T_r tokens, T = Σ T_r; s_ti is the softmax
of a token's router logits z_ti over experts, m_ti is 1 where it goes to expert i.

    aux_loss      E / (K T²)   Σ_i (Σ_t m_ti)(Σ_t s_ti)      over all rows: Switch Transformer, arXiv 2101.03961, eq. 4
    seq_aux_loss  Σ_r v_r E / (K T_r²) Σ_i (Σ_t m_ti)(Σ_t s_ti)   over t of row r: arXiv 2405.04434, section 2.2.2
    z loss        Σ_r v_r / T_r  Σ_t (log Σ_i exp z_ti)²     over t of row r: arXiv 2202.08906, equation 5

v_r is the share of row r in what the micro-batch counts (its targets; rows of pairs count alike), and each micro-batch
weighs as much as it counts: so `seq_aux_loss` and z loss of a batch are the same in whatever micro-batches, while
`aux_loss` is of those that meet in one. A token that rows share counts once for each of them; padding never does.

With pipeline stages a rank has several micro-batches under way, and recomputes one amid others: what belongs to a
micro-batch, `RowsOfPlaces`, goes with it through the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemo_aligner.config.architecture import Architecture


@dataclass(frozen=True)
class RowsOfPlaces:
    """Which rows the places of a stream belong to: `member` `[R, N]` float32 of 0 and 1 for this rank's places.

    `lengths` `[R]` are T_r, `shares` `[R]` v_r, float32; `count` is what the micro-batch counts. `found`: what the
    losses of each layer come to, [load balancing, z], as far as this rank's places have them.
    """

    member: Tensor
    lengths: Tensor
    shares: Tensor
    count: Tensor
    found: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, places: Tensor, lengths: Tensor, counts: Tensor, size: int, own: Tensor, rows_of_one: int = 1
    ) -> RowsOfPlaces:
        """Of a stream of `size` places, of which this rank has `own` `[N]`; `places` `[R, S]` as in Layout.

        `counts` `[R]`: what each row counts for; where nothing counts, all rows have the same share. `rows_of_one`:
        rows that count as one, two of a pair.
        """
        member = torch.zeros(len(places), size, device=places.device)
        rows, tokens = (torch.arange(places.size(1), device=places.device) < lengths[:, None]).nonzero(as_tuple=True)
        member[rows, places[rows, tokens]] = 1.0
        counts = counts.float()
        total = counts.sum()
        shares = torch.where(total > 0, counts / total, 1 / len(places))
        return cls(member[:, own].contiguous(), lengths.float(), shares, total / rows_of_one)


@dataclass(frozen=True)
class RouterLosses:
    """The losses of all routers of a model.

    A router's loss joins the graph at the router, for recomputed layers have no graph when the loss is known.
    """

    kind: str
    coeff: float
    z_coeff: float
    topk: int

    @classmethod
    def of(cls, arch: Architecture) -> RouterLosses:
        balanced = arch.moe_router_load_balancing_type != "none"
        coeff = arch.moe_aux_loss_coeff if balanced else 0.0
        kind = arch.moe_router_load_balancing_type
        return cls(kind, coeff, arch.moe_z_loss_coeff or 0.0, arch.moe_router_topk)

    @property
    def asked(self) -> bool:
        return self.coeff > 0 or self.z_coeff > 0

    def join(self, rows: RowsOfPlaces, layer: int, logits: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
        """`probs`, through whose gradient the layer's losses add theirs; logits, probs and chosen are `[N, E]`.

        Where places are cut over ranks, each has the part of the losses that its places have.
        """
        values = self._values(rows, logits.float(), chosen)
        rows.found[layer] = values.detach()
        if not torch.is_grad_enabled():
            return probs
        return _Joined.apply(probs, values @ values.new_tensor([self.coeff, self.z_coeff]), rows.count)

    def _values(self, rows: RowsOfPlaces, logits: Tensor, chosen: Tensor) -> Tensor:
        experts = logits.size(1)
        tokens = _summed(rows.member @ chosen.float(), _ranks_of_places())  # [R, E]
        scores = rows.member @ logits.softmax(-1)
        if self.kind == "seq_aux_loss":
            balance = (rows.shares / rows.lengths.square() * (tokens * scores).sum(1)).sum()
        else:
            balance = (tokens.sum(0) * scores.sum(0)).sum() / rows.lengths.sum().square()
        squares = rows.member @ logits.logsumexp(-1).square()
        return torch.stack([balance * experts / self.topk, (rows.shares / rows.lengths * squares).sum()])

    def sums(self, microbatches: Sequence[RowsOfPlaces]) -> list[dict[str, Tensor]]:
        """What there is to report of each micro-batch, times its count: each loss, summed over layers. Collective."""
        own = [torch.stack([*rows.found.values(), rows.lengths.new_zeros(2)]).sum(0) for rows in microbatches]
        values = _summed(torch.stack(own), _ranks_of_places(), parallel_state.get_pipeline_model_parallel_group())
        named = (("load_balancing_loss", self.coeff), ("router_z_loss", self.z_coeff))
        return [
            {name: value * rows.count for (name, coeff), value in zip(named, pair, strict=True) if coeff > 0}
            for rows, pair in zip(microbatches, values, strict=True)
        ]


def _ranks_of_places() -> dist.ProcessGroup:
    """Those that have a stream's places between them (sequence and context parallelism)."""
    return parallel_state.get_tensor_and_context_parallel_group()


def _summed(values: Tensor, *groups: dist.ProcessGroup) -> Tensor:
    """`values`, in place, summed over the ranks of all groups."""
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(values, group=group)
    return values


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, None]:
        return given, ctx.weight, None


class _Router(TopKRouter):
    """Megatron's, with losses that know rows."""

    rows: RowsOfPlaces | None = None  # of the forward pass that is under way, where it has losses

    def __init__(self, *, losses: RouterLosses, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses = losses

    def gating(self, input: Tensor) -> Tensor:
        """Logits `[N, B, E]`; Megatron's needs Transformer Engine to be importable."""
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs, chosen = super().routing(logits, padding_mask)
        if self.rows is None:
            return probs, chosen
        logits = logits.view(-1, self.num_experts)
        return self.losses.join(self.rows, self.layer_number, logits, probs, chosen), chosen


class ExpertLayer(TransformerLayer):
    """Megatron's, whose router is told which micro-batch it is given."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        router, dispatcher = self.mlp.router, self.mlp.token_dispatcher
        router.rows = None if packed_seq_params is None else packed_seq_params.members
        output = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        # what it would keep until its next pass, with the graph of this one: of a recomputed layer input and gradient
        router.rows = dispatcher.probs = dispatcher.routing_map = None
        return output


def expert_spec(arch: Architecture, losses: RouterLosses, activation: Any) -> ModuleSpec:
    """The feed-forward part of a layer with experts: one after another, which needs no library of grouped products.

    `activation` is what Megatron's config calls use_te_activation_func; None where its own is used.
    """
    spec = get_moe_module_spec(use_te=False, num_experts=arch.num_moe_experts, moe_grouped_gemm=False)
    spec.submodules.router = functools.partial(_Router, losses=losses)
    spec.submodules.experts.submodules.activation_func = activation
    return spec


def expert_settings(arch: Architecture, ep: int, etp: int) -> dict[str, Any]:
    """What Megatron's config says of experts; nothing for a model without. Losses of the router are not Megatron's."""
    if arch.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": arch.num_moe_experts,
        "moe_router_topk": arch.moe_router_topk,
        "moe_ffn_hidden_size": arch.expert_ffn_hidden_size,
        "moe_layer_freq": arch.moe_layer_freq,
        "moe_router_pre_softmax": arch.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
