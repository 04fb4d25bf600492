import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distaccum.config.components import LanguageModelingConfig
from distaccum.config.enums import Normalize
from distaccum.config.instantiate import build
from distaccum.errors import UserError
from distaccum.tasks import LanguageModeling

LENGTHS = [5, 1, 3]
VOCABULARY = 7


class Table(nn.Module):
    """Logits `[B, T, V]` that depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.logits(tokens)
        return logits


def padded(lengths: list[int], length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCABULARY, (len(lengths), length + 1), generator=generator)
    inputs, targets = text[:, :-1].clone(), text[:, 1:].clone()
    for row, valid in enumerate(lengths):
        inputs[row, valid:] = 0
        targets[row, valid:] = -100
    return inputs, targets


def test_sums_and_weight() -> None:
    inputs, targets = padded(LENGTHS, 5)
    model = Table()
    output = LanguageModeling()(model, (inputs, targets))
    valid = targets != -100
    logits = model(inputs)[valid]
    assert torch.allclose(output.loss_sum, F.cross_entropy(logits, targets[valid], reduction="sum"), rtol=1e-14)
    assert isinstance(output.weight, Tensor)
    assert output.weight.shape == ()
    assert output.weight.item() == sum(LENGTHS)
    assert output.sums["accuracy"].item() == (logits.argmax(dim=1) == targets[valid]).sum().item()


@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6), extra=st.integers(0, 3), data=st.data())
def test_neither_padding_nor_the_cut_changes_the_sums(lengths: list[int], extra: int, data: st.DataObject) -> None:
    inputs, targets = padded(lengths, 6)
    cut = data.draw(st.integers(1, len(lengths) - 1))
    model, task = Table(), LanguageModeling()
    whole = task(model, (inputs, targets))
    wide = (F.pad(inputs[:cut], (0, extra)), F.pad(targets[:cut], (0, extra), value=-100))
    parts = [task(model, wide), task(model, (inputs[cut:], targets[cut:]))]
    assert torch.allclose(parts[0].loss_sum + parts[1].loss_sum, whole.loss_sum, rtol=1e-12, atol=1e-12)
    assert parts[0].weight + parts[1].weight == whole.weight == sum(lengths)
    assert parts[0].sums["accuracy"] + parts[1].sums["accuracy"] == whole.sums["accuracy"]


def test_a_micro_batch_of_padding_adds_nothing() -> None:
    inputs, targets = padded([0, 0], 3)
    model = Table()
    output = LanguageModeling()(model, (inputs, targets))
    assert output.loss_sum.item() == 0
    assert output.weight == 0
    output.loss_sum.backward()
    assert model.logits.weight.grad is not None
    assert not model.logits.weight.grad.any()


def test_another_ignore_index() -> None:
    inputs, targets = padded(LENGTHS, 5)
    output = LanguageModeling()(Table(), (inputs, targets))
    targets[targets == -100] = 99
    other = LanguageModeling(ignore_index=99)(Table(), (inputs, targets))
    assert other.weight == output.weight
    assert torch.equal(other.loss_sum, output.loss_sum)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_is_in_float32_at_least(dtype: torch.dtype) -> None:
    inputs, targets = padded(LENGTHS, 5)
    assert LanguageModeling()(Table().to(dtype), (inputs, targets)).loss_sum.dtype == torch.float32
    assert LanguageModeling()(Table(), (inputs, targets)).loss_sum.dtype == torch.float64


@pytest.mark.parametrize("target", [VOCABULARY, -1])
def test_a_target_outside_the_vocabulary(target: int) -> None:
    inputs, targets = padded(LENGTHS, 5)
    targets[0, 0] = target
    with pytest.raises(UserError, match=rf"LanguageModeling: the model has 7 outputs.*{target}"):
        LanguageModeling()(Table(), (inputs, targets))


def test_batches_of_another_form() -> None:
    inputs, targets = padded(LENGTHS, 5)
    for batch in [inputs, (inputs,), {"inputs": inputs}]:
        with pytest.raises(UserError, match="LanguageModeling needs micro-batches with inputs and targets"):
            LanguageModeling()(Table(), batch)
    with pytest.raises(UserError, match=r"got logits \[3, 5, 7\] and targets \[3, 4\]"):
        LanguageModeling()(Table(), (inputs, targets[:, :4]))
    with pytest.raises(UserError, match=r"got logits \[3, 7\] and targets \[3\]"):
        LanguageModeling()(Table(), (inputs[:, 0], targets[:, 0]))


@pytest.mark.parametrize("normalize", list(Normalize))
def test_what_the_loss_is_a_mean_over(normalize: Normalize) -> None:
    """Against sums in a loop, of any cut; a sample without a valid target is among them."""
    lengths = [5, 0, 1, 3]
    inputs, targets = padded(lengths, 5)
    model, task = Table(), LanguageModeling(normalize=normalize.value)
    parts = [task(model, (inputs[rows], targets[rows])) for rows in (slice(0, 1), slice(1, 4))]
    losses = [
        F.cross_entropy(model(inputs)[row, :valid], targets[row, :valid], reduction="none")
        for row, valid in enumerate(lengths)
    ]
    wanted = {
        Normalize.tokens: torch.cat(losses).mean(),
        Normalize.sequences: torch.stack([loss.mean() for loss in losses if len(loss)]).mean(),
        Normalize.samples: torch.stack([loss.sum() for loss in losses]).mean(),
    }
    loss_sum = torch.stack([part.loss_sum for part in parts]).sum()
    weight = float(sum(float(part.weight) for part in parts))
    assert float((loss_sum / weight).detach()) == pytest.approx(float(wanted.pop(normalize).detach()), rel=1e-12)
    assert all(abs(float((loss_sum / weight - other).detach())) > 1e-3 for other in wanted.values())
    sums = {name: parts[0].sums[name] + parts[1].sums[name] for name in parts[0].sums}
    hits = (model(inputs).argmax(-1) == targets).sum()
    assert task.metrics(sums, weight) == {"accuracy": pytest.approx(float(hits) / 9)}


def test_an_unknown_normalization() -> None:
    with pytest.raises(UserError, match=r"task\.normalize=words is none of tokens, sequences, samples"):
        LanguageModeling(normalize="words")


def test_the_configured_section_fits() -> None:
    assert isinstance(build(LanguageModelingConfig(), "task"), LanguageModeling)
    task = build(LanguageModelingConfig(normalize=Normalize.sequences), "task")
    assert task.normalize is Normalize.sequences
