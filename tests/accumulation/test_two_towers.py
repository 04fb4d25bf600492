"""The two towers of docs/examples/contrastive.md, with transformers' models: any cut makes the update of one shot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from documents import block_run_by
from examples import distance, flat
from torch import Tensor, nn

from distaccum import Accumulator, UpdateResult, WindowLoader, accumulate_coupled

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

FOUND: dict[str, Any] = {}
exec(block_run_by("accumulation/test_two_towers.py"), FOUND)
TEXT = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT |= {"max_position_embeddings": 12}
SAMPLES = 21


def _tokens(length: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 30, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _sentence_pairs() -> list[dict[str, dict[str, Tensor]]]:
    """Of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 12, (SAMPLES, 2), generator=generator).tolist()
    return [{"query": _tokens(q, generator), "passage": _tokens(p, generator)} for q, p in lengths]


def _images_and_text() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [{"pixel_values": image, **_tokens(6, generator)} for image in images]


def _bert() -> nn.Module:
    config = transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return model


def _two_encoders() -> nn.Module:
    model: nn.Module = FOUND["Sentences"](_bert(), _bert())
    return model


def _one_encoder() -> nn.Module:
    encoder = _bert()
    model: nn.Module = FOUND["Sentences"](encoder, encoder)
    return model


def _clip() -> nn.Module:
    vision = {**TEXT, "image_size": 8, "patch_size": 4}
    del vision["vocab_size"], vision["max_position_embeddings"]
    text = {**TEXT, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    model: nn.Module = FOUND["ImagesAndText"](transformers.CLIPModel(config))
    return model


def _updates(
    build: Callable[[], nn.Module], data: list[Any], task: Any, micro_batch_size: int, *, plain: bool = False
) -> tuple[list[UpdateResult], Tensor]:
    torch.manual_seed(2)
    model = build().double().train()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=1.0)
    results = []
    for window in WindowLoader(data, global_batch_size=9, micro_batch_size=micro_batch_size, seed=3):
        if plain:
            with accumulator.window(window) as micro_batches:
                for batch in micro_batches:
                    output = task(model, batch)
                    accumulator.backward(output.loss_sum, output.weight, output.sums)
        else:
            accumulate_coupled(accumulator, window, embed=lambda batch: task.embed(model, batch), loss=task.window_loss)
        results.append(accumulator.step())
    return results, flat(model)


@pytest.mark.parametrize(
    ("build", "data", "both_ways"),
    [
        pytest.param(_two_encoders, _sentence_pairs, False, id="two encoders"),
        pytest.param(_one_encoder, _sentence_pairs, False, id="one encoder for both"),
        pytest.param(_clip, _images_and_text, True, id="CLIP"),
    ],
)
def test_any_cut_is_one_shot(build: Any, data: Any, both_ways: bool) -> None:
    samples, task = data(), FOUND["InBatchNegatives"](both_ways)
    wanted, wanted_parameters = _updates(build, samples, task, 9, plain=True)
    assert [result.weight for result in wanted] == [9, 9, 3]
    found, parameters = _updates(build, samples, task, 2)
    assert distance(parameters, wanted_parameters) < 1e-12
    for mine, reference in zip(found, wanted, strict=True):
        assert distance(mine.loss, reference.loss) < 1e-12
        assert distance(mine.grad_norm, reference.grad_norm) < 1e-12
        assert mine.sums == reference.sums
    # The negative control: negatives of each micro-batch alone.
    missed, others = _updates(build, samples, task, 2, plain=True)
    assert distance(others, wanted_parameters) > 1e-3
    assert distance(missed[0].loss, wanted[0].loss) > 1e-2
