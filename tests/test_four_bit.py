"""Adapters over 4-bit weights, from files to what peft loads: sharded, killed on two ranks, and gone on with on one."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import forking
import pytest
import tiny_language_model
import torch
from command_line import metrics, without_measurements
from safetensors.torch import load_file, save_file
from test_finetune import COMMAND, IMPORTED, evaluations_of, loss_of

from distaccum import UserError
from distaccum.config import DPConfig
from distaccum.config.compose import compose
from distaccum.models import causal_lm
from distaccum.strategies import place
from distaccum.training.unfreezing import make_trainable

LORA = ("train.epochs=2", "model.lora.rank=4", "model.lora.alpha=64", "model.load_in_4bit=true")
GIVEN = ("experiment=finetune", "model.name_or_path=a", "data.files=b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("four_bit")
    tiny_language_model.write_model(path / "llama")
    tiny_language_model.write_chats(path / "chats.jsonl", 100)
    return path


def loaded(folder: Path, **more: Any) -> Any:
    return causal_lm(str(folder / "llama"), vocab_size=320, max_length=48, load_in_4bit=True, lora={"rank": 4}, **more)


def layers_of(model: Any) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if hasattr(part, "scales_of_scales")}


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> forking.Ended:
    command = (*COMMAND, *LORA, "run_dir=whole", "strategy=fsdp")
    ended = forking.run(*command, ranks=2, folder=folder, imported=IMPORTED)
    assert ended.status == 0, ended.err
    return ended


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_peft_loads_what_is_left(folder: Path, unbroken: forking.Ended) -> None:
    """Its adapters have, over the 4-bit weights multiplied out, the loss that the run measured."""
    import peft
    import transformers

    assert "model.lora: adapters of rank 4 in 14 layers, 4096 of 43168 parameters (9.49 %)" in unbroken.out
    assert "model.load_in_4bit: 14 layers, 47.2 % of the frozen parameters, are 0.024 MB" in unbroken.out
    evaluations = evaluations_of(folder / "whole")
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.03
    assert {path.suffix for path in (folder / "whole").glob("*model*")} == {".safetensors"}
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64)
    whole = copy.deepcopy(base)
    for name, layer in layers_of(loaded(folder)).items():
        base.get_submodule(name.removesuffix(".base_layer")).weight.data = layer.multiplied_out(torch.float64)
    for model, is_ours in ((base, True), (whole, False)):
        model = peft.PeftModel.from_pretrained(model, folder / "whole", autocast_adapter_dtype=False).double()
        assert (loss_of(model, folder / "whole") == pytest.approx(evaluations[-1]["loss"], rel=1e-6)) is is_ours


def test_a_killed_run_goes_on_on_one_rank(folder: Path, unbroken: forking.Ended) -> None:
    running = forking.start(*COMMAND, *LORA, "run_dir=killed", ranks=2, folder=folder, imported=IMPORTED)
    file = folder / "killed" / "metrics.jsonl"
    while running.poll() is None and not (file.exists() and file.read_text().count("\n") > 8):
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert len(metrics(folder / "killed")) < len(metrics(folder / "whole")), "it had ended by itself"
    ended = forking.run(*COMMAND, *LORA, "run_dir=killed", folder=folder, imported=IMPORTED)
    assert ended.status == 0, ended.err
    assert "ranks: 2 → 1" in ended.out
    whole, parts = ([without_measurements(line) for line in metrics(folder / name)] for name in ("whole", "killed"))
    assert len(whole) == len(parts)
    for wanted, found in zip(whole, parts, strict=True):
        assert found.get("eval", found)["loss"] == pytest.approx(wanted.get("eval", wanted)["loss"], rel=1e-9)
    evaluated = forking.run("-m", "distaccum.evaluate", "killed", folder=folder, imported=IMPORTED)
    assert evaluated.status == 0, evaluated.err
    last = evaluations_of(folder / "killed")[-1]["loss"]
    assert float(evaluated.out.splitlines()[-1].split()[-3]) == pytest.approx(last, rel=1e-3)


def test_another_base_is_refused_though_its_codes_are_the_same(folder: Path, unbroken: forking.Ended) -> None:
    name = "model.layers.1.mlp.up_proj"
    shutil.copytree(folder / "llama", folder / "doubled")
    weights = load_file(folder / "doubled" / "model.safetensors")
    weights[f"{name}.weight"] *= 2
    save_file(weights, folder / "doubled" / "model.safetensors", {"format": "pt"})
    words = ("-m", "distaccum.evaluate", "whole", "model.name_or_path=doubled")
    ended = forking.run(*words, folder=folder, imported=IMPORTED)
    assert ended.status == 2
    assert f"some are others here: {name}.base_layer.scales_of_scales (fingerprint: uint8" in ended.message


def test_adapters_that_are_frozen_are_saved_as_they_are_drawn(folder: Path) -> None:
    words = ("run_dir=half", "model.freeze=[*lora_A*]", "train.max_updates=2")
    trained = forking.run(*COMMAND, *LORA, *words, folder=folder, imported=IMPORTED)
    assert trained.status == 0, trained.err
    evaluated = forking.run("-m", "distaccum.evaluate", "half", folder=folder, imported=IMPORTED)
    assert evaluated.status == 0, evaluated.err


def test_weights_of_4_bits_are_not_unfrozen(folder: Path) -> None:
    with pytest.raises(UserError, match=r"\*base_layer\.weight names integers alone, as weights of 4 bits are"):
        make_trainable(loaded(folder), {2: ["*base_layer.weight"]}, ())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "needs adapters that are: set model.lora.rank"),
        (("model.lora.rank=4", "model.lora.merge=true"), "model.lora.merge=true does not support model.load_in_4bit"),
        (("model.lora.rank=4", "model.from_config=true"), "model.from_config=true has none"),
        (("model.lora.rank=4", "model.init_on_meta=true"), "does not support model.init_on_meta=true"),
        (("model.lora.rank=4", "model.init_from=x"), "does not support model.init_from"),
    ],
)
def test_what_needs_whole_weights_is_refused(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose([*GIVEN, "model.load_in_4bit=true", *more])


def test_what_its_weights_are_saved_in(folder: Path) -> None:
    """A model that was saved in 4 bits is loaded as it is; in another format, or to be trained whole, it is refused."""
    sizes = {"vocab_size": 320, "max_length": 48}
    config = json.loads((folder / "llama" / "config.json").read_text())
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UserError, match="quantised by gptq, in a format that is not supported"):
        causal_lm(str(other), load_in_4bit=True, lora={"rank": 4}, **sizes)

    import transformers

    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    auto = transformers.AutoModelForCausalLM
    auto.from_pretrained(folder / "llama", quantization_config=how, device_map={"": "cpu"}).save_pretrained(other)
    with pytest.raises(UserError, match="holds weights of 4 bits, which can't be trained"):
        causal_lm(str(other), **sizes)
    ours, theirs = loaded(folder), causal_lm(str(other), load_in_4bit=True, lora={"rank": 4}, **sizes)
    for one, two in zip(layers_of(ours).values(), layers_of(theirs).values(), strict=True):
        assert torch.equal(one.weight, two.weight)
        assert (one.multiplied_out(torch.float32) - two.multiplied_out(torch.float32)).abs().max() < 1e-3
    assert theirs.config.to_dict().get("quantization_config") is None


def test_it_computes_as_the_rest_of_the_model_does(folder: Path) -> None:
    model = loaded(folder)
    name, layer = next(iter(layers_of(model).items()))
    plain = tiny_language_model.model_of(tiny_language_model.config_of()).get_submodule(
        name.removesuffix(".base_layer")
    )
    error = (layer.multiplied_out(torch.float32) - plain.weight).norm() / plain.weight.norm()
    assert 0.08 < error < 0.1, "of normally distributed numbers it is 0.091"
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    weight = layer.multiplied_out(torch.float64)
    output = layer.eval()(x.double())  # where bitsandbytes' own rounds the scales to bfloat16 on some CPUs
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(output, x.double() @ weight.T)
    assert torch.allclose(gradient, (2 * output @ weight).float())


def test_replicas_in_one_process(folder: Path) -> None:
    model = loaded(folder).double()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(24).view(4, 6)
    wanted = model(tokens).logits
    strategy = place(copy.deepcopy(model), DPConfig(replicas=2), torch.device("cpu"))
    assert torch.allclose(strategy.model(tokens).logits, wanted, rtol=1e-12)


@pytest.mark.gpu
def test_on_a_gpu(folder: Path) -> None:
    """The weights are those of the CPU but for rounding, and the gradients of a window cut into parts those of one
    shot."""
    model = loaded(folder)
    on_cpu = {name: layer.multiplied_out(torch.bfloat16) for name, layer in layers_of(model).items()}
    model = model.to("cuda")
    for name, layer in layers_of(model).items():
        found = layer.multiplied_out(torch.bfloat16).cpu()
        torch.testing.assert_close(found, on_cpu[name], rtol=2**-7, atol=0, msg=name)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(48, device="cuda").view(8, 6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(parts: list[torch.Tensor], autocast: bool) -> torch.Tensor:
        for part in parts:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                logits = model(part).logits.float()
            torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="sum").backward()
        found = torch.cat([parameter.grad.flatten() for parameter in trained])
        model.zero_grad()
        return found

    for autocast, tolerance in ((False, 1e-5), (True, 3e-2)):
        wanted = gradient([tokens], autocast)
        found = gradient([tokens[:1], tokens[1:4], tokens[4:]], autocast)
        assert (found - wanted).norm() < tolerance * wanted.norm()
        assert (gradient([tokens[:4]], autocast) - wanted).norm() > 0.1 * wanted.norm()
