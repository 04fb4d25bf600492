"""The next token, and experts that are used alike, for mixtures of experts of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation.result import MAIN, LossTerm, TaskOutput
from distaccum.errors import UserError, require_positive
from distaccum.tasks.causal_lm import CausalLM
from distaccum.tasks.chunked_loss import head_of

ROUTER = "router"
"""Name of the term."""


class MixtureLM(CausalLM):
    """`CausalLM` with a loss that balances the experts of each sequence, the term `router`.

    Of a sequence, with E experts of which each token takes k, over all tokens and layers together:

        E Σ_e (share of the tokens that take expert e) · (mean probability that the router gives expert e)

    This is the load balancing loss of Switch Transformers (Fedus et al. 2021, equations 4 to 6), of each sequence by
    itself as in DeepSeek-V2 and V3. Taken over the tokens of a micro-batch, as transformers' models have it, it would
    be another loss for each cut; of a sequence it is a sum over the window, and the same for any.

    Args:
        coefficient: what the mean over sequences is multiplied by. None: the model's own `router_aux_loss_coef`.
        others: as for `CausalLM`.

    Raises:
        UserError: as for `CausalLM`; and from a call, the model has no routers, or says no coefficient.
    """

    def __init__(self, coefficient: float | None = None, **others: Any) -> None:
        super().__init__(**others)
        require_positive(task__coefficient=coefficient)
        self.coefficient = coefficient

    def weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        _, targets = self._inputs_and_targets(batch)
        _, starts = _sequences(batch, targets)
        return {MAIN: self._weight(targets != self.ignore_index), ROUTER: starts.sum()}

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        with_routers = _WithRouters(model)
        output = super().__call__(with_routers, batch)  # type: ignore[arg-type]
        config = getattr(getattr(model, "module", model), "config", None)
        experts_of_token = getattr(config, "num_experts_per_tok", None)
        coefficient = self.coefficient or getattr(config, "router_aux_loss_coef", None)
        routers = getattr(with_routers.output, "router_logits", None)
        if not routers or experts_of_token is None or coefficient is None:
            raise UserError(
                f"MixtureLM: the model ({type(model).__name__}) is no mixture of experts that returns router_logits, "
                "or its configuration says no num_experts_per_tok or router_aux_loss_coef. Set task=causal_lm, or "
                "task.coefficient."
            )
        tokens, starts = _sequences(batch, batch["labels"])
        loss_sum = _balance([logits for logits in routers if logits is not None], experts_of_token, tokens, starts)
        term = LossTerm(loss_sum, starts.sum(), coefficient)
        return dataclasses.replace(output, terms={**output.terms, ROUTER: term})


class _WithRouters:
    """Calls a model for its routers' logits too, and keeps the output."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.output: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self.output = self._model(**inputs, output_router_logits=True)
        return self.output

    def get_output_embeddings(self) -> nn.Module:
        return head_of(self._model)


def _sequences(batch: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which places of a micro-batch hold tokens, and at which a sequence begins, bool `[B, T]` each."""
    if "position_ids" in batch:  # sequences end to end, without padding
        return torch.ones_like(like, dtype=torch.bool), batch["position_ids"] == 0
    mask = batch.get("attention_mask")
    tokens = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    starts = torch.zeros_like(tokens)
    starts[:, 0] = tokens[:, 0]
    return tokens, starts


def _balance(routers: Sequence[Tensor], experts_of_token: int, tokens: Tensor, starts: Tensor) -> Tensor:
    """Sums the balancing loss over sequences.

    Args:
        routers: logits `[B · T, E]` of each layer.
        tokens, starts: as `_sequences` returns them.
    """
    valid = tokens.flatten()
    # Of at most as many sequences as places: their number is known on the device alone.
    sequence = (starts.flatten().cumsum(0) - 1).clamp(min=0)
    taken = probability = torch.zeros((), device=valid.device)
    for logits in routers:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        chosen = torch.zeros_like(wide).scatter_(1, wide.topk(experts_of_token, dim=-1).indices, 1.0)
        taken = taken + chosen * valid[:, None]
        probability = probability + wide * valid[:, None]
    sums = [torch.zeros_like(value).index_add(0, sequence, value) for value in (taken, probability)]
    lengths = valid.new_zeros(len(valid), dtype=wide.dtype).index_add(0, sequence, valid.to(wide.dtype))
    shares = [value / (len(routers) * lengths.clamp(min=1))[:, None] for value in sums]
    return wide.shape[1] * (shares[0].detach() * shares[1]).sum()
