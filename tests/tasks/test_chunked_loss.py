"""The loss inside a model's head: the same as that of its logits, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.config import DPConfig
from distaccum.errors import UserError
from distaccum.models import GPT
from distaccum.models.ensemble import Ensemble
from distaccum.strategies import place
from distaccum.tasks import CausalLM, LanguageModeling, loss_in_head

VOCABULARY = 37
Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    """Logits of each token by itself, changed in some way."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda logits: logits, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head: nn.Module = nn.Linear(8, VOCABULARY, bias=bias)
        self.change = change
        self.double()

    def forward(self, tokens: Tensor) -> Any:
        return self.change(self.head(torch.tanh(self.embedding(tokens))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size=VOCABULARY, max_length=16, num_layers=1, num_heads=2, width=8).double()


@pytest.fixture
def batch() -> Batch:
    tokens = torch.randint(VOCABULARY, (5, 10), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[0, 3:] = -100
    targets[2] = -100
    return tokens, targets


def trained(task: LanguageModeling, model: nn.Module, batch: Any) -> tuple[Any, list[Tensor]]:
    output = task(model, batch)
    return output, list(torch.autograd.grad(output.loss_sum, list(model.parameters())))


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "samples"])
@pytest.mark.parametrize("made", [gpt, Model, lambda: Model(bias=False)])
def test_sums_and_gradients_are_those_of_whole_logits(
    made: Callable[[], nn.Module], normalize: str, batch: Batch
) -> None:
    model = made()
    wanted, right = trained(LanguageModeling(normalize=normalize), model, batch)
    names = list(model.state_dict())
    found, gradients = trained(LanguageModeling(normalize=normalize, chunked_loss=True), model, batch)
    assert list(model.state_dict()) == names
    assert type(found.loss_sum) is Tensor
    assert found.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=1e-13)
    assert found.weight == wanted.weight
    assert found.sums == wanted.sums
    for mine, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert LanguageModeling(normalize=normalize, chunked_loss=True)(model, batch).loss_sum == found.loss_sum
    assert model(batch[0]).shape == (5, 10, VOCABULARY)  # as before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: logits / 2, "something on its logits (truediv|div)"),
        (lambda logits: 30 * torch.tanh(logits), r"something on its logits \(tanh\)"),
        (lambda logits: logits[..., :30], r"something on its logits \(getitem\)"),
        (lambda logits: logits.detach(), r"something on its logits \(detach\)"),
        (lambda logits: F.softmax(logits, -1), r"something on its logits \(softmax\)"),
        (lambda logits: torch.zeros(3), "does not return what its head, Linear, computes"),
    ],
)
def test_logits_that_are_not_the_heads_are_refused(change: Callable[[Tensor], Any], said: str, batch: Batch) -> None:
    model = Model(change)
    with pytest.raises(UserError, match=said.replace("(truediv|div)", r"\((truediv|div)\)")):
        LanguageModeling(chunked_loss=True)(model, batch)
    assert "forward" not in vars(model.head)


def test_what_changes_nothing_is_allowed(batch: Batch) -> None:
    model = Model(lambda logits: {"logits": logits.contiguous().to(torch.float64), "size": logits.dim()})
    found, wanted = (LanguageModeling(chunked_loss=chunked)(model, batch) for chunked in (True, False))
    assert found.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=1e-13)


def test_a_head_that_is_called_twice_or_never_is_refused(batch: Batch) -> None:
    model = Model()
    with pytest.raises(UserError, match="several times in a forward"):
        loss_in_head(model, lambda: (model(batch[0]), model(batch[0])), batch[1])
    with pytest.raises(UserError, match="without its head, Linear"):
        loss_in_head(model, lambda: batch[0], batch[1])
    with pytest.raises(UserError, match=r"logits of \[5, 10\] places, and the targets are \[5, 9\]"):
        loss_in_head(model, lambda: model(batch[0]), batch[1][:, 1:])


def test_heads_of_other_kinds_are_refused(batch: Batch) -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    task, model = LanguageModeling(chunked_loss=True), Model()
    model.head = Own(8, VOCABULARY)
    with pytest.raises(UserError, match=r"last layer, a torch.nn.Linear; Model has a .*Own there"):
        task(model, batch)
    model.head = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="Model returns None there"):
        task(model, batch)
    with pytest.raises(UserError, match=r"Embedding has no get_output_embeddings\(\)"):
        task(nn.Embedding(3, 3), batch)


def test_dp_is_refused(batch: Batch) -> None:
    strategy = place(Model(), DPConfig(replicas=2), torch.device("cpu"))
    with pytest.raises(UserError, match="does not support strategy=dp"):
        LanguageModeling(chunked_loss=True)(strategy.model, batch)


def test_an_ensemble_has_whole_logits(batch: Batch) -> None:
    models = [Model().eval(), gpt().eval()]
    found, wanted = (
        LanguageModeling(chunked_loss=chunked)(Ensemble(models, class_dim=-1), batch) for chunked in (True, False)
    )
    assert found.loss_sum == wanted.loss_sum


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo's own doing
def test_compiled_models(batch: Batch) -> None:
    """A compiled model is compiled once, although its head is replaced in each call."""
    model = gpt()
    wanted, right = trained(LanguageModeling(), model, batch)
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        found, gradients = trained(LanguageModeling(chunked_loss=True), compiled, batch)
        assert found.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=1e-13)
        for mine, other in zip(gradients, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    scaled: Any = torch.compile(Model(lambda logits: logits / 2), backend="aot_eager")
    with pytest.raises(UserError, match="something on its logits"):
        LanguageModeling(chunked_loss=True)(scaled, batch)


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of_transformers(kind: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **options})
    return transformers.AutoModelForCausalLM.from_config(config).double()


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    ],
)
def test_models_of_transformers(kind: str, options: dict[str, Any], normalize: str, batch: Batch) -> None:
    model = of_transformers(kind, **options)
    names = list(model.state_dict())
    inputs = {"input_ids": batch[0], "attention_mask": torch.ones_like(batch[0]), "labels": batch[1]}
    wanted, right = trained(CausalLM(normalize=normalize), model, inputs)
    found, gradients = trained(CausalLM(normalize=normalize, chunked_loss=True), model, inputs)
    assert found.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=1e-12)
    assert found.weight == wanted.weight
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-12, atol=0)
    for mine, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(("kind", "options"), [("gemma2", {}), ("cohere", {}), ("granite", {"logits_scaling": 3.0})])
def test_models_of_transformers_that_scale_or_cap_logits_are_refused(
    kind: str, options: dict[str, Any], batch: Batch
) -> None:
    model = of_transformers(kind, **options)
    with pytest.raises(UserError, match="computes something on its logits"):
        loss_in_head(model, lambda: model(input_ids=batch[0]), batch[1])
