"""Fine-tuning with low-rank adapters, from files to what peft loads: on two ranks, killed, and gone on with on one."""

from __future__ import annotations

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
from distaccum.checkpoints.folder import checkpoints_in, read_checkpoint
from distaccum.config.compose import compose
from distaccum.config.lora import LoraConfig
from distaccum.models import causal_lm
from distaccum.models.lora import add_adapters, is_adapter
from distaccum.training.export import check_exported

LORA = (*COMMAND, "model.lora.rank=4", "model.lora.alpha=64", "train.epochs=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    tiny_language_model.write_model(path / "llama")
    tiny_language_model.write_chats(path / "chats.jsonl", 100)
    return path


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> forking.Ended:
    ended = forking.run(*LORA, "run_dir=whole", "strategy=fsdp", ranks=2, folder=folder, imported=IMPORTED)
    assert ended.status == 0, ended.err
    return ended


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_peft_loads_what_is_left(folder: Path, unbroken: forking.Ended) -> None:
    import peft
    import transformers

    assert "model.lora: adapters of rank 4 in 14 layers, 4096 of " in unbroken.out
    evaluations = evaluations_of(folder / "whole")
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.03
    assert not (folder / "whole" / "model.safetensors").exists()
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(folder / "llama", dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, folder / "whole", autocast_adapter_dtype=False).double()
    assert loss_of(model, folder / "whole") == pytest.approx(evaluations[-1]["loss"], rel=1e-6)
    assert peft.PeftConfig.from_pretrained(folder / "whole").base_model_name_or_path == str(folder / "llama")
    # Found by its configuration alone.
    assert loss_of(auto.from_pretrained(folder / "whole", dtype=torch.float64), folder / "whole") == pytest.approx(
        evaluations[-1]["loss"], rel=1e-6
    )


def test_a_killed_run_goes_on_on_one_rank_and_is_merged_on_request(folder: Path, unbroken: forking.Ended) -> None:
    import transformers

    running = forking.start(*LORA, "run_dir=killed", ranks=2, folder=folder, imported=IMPORTED)
    file = folder / "killed" / "metrics.jsonl"
    while running.poll() is None and not (file.exists() and file.read_text().count("\n") > 8):
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert len(metrics(folder / "killed")) < len(metrics(folder / "whole")), "it had ended by itself"
    ended = forking.run(*LORA, "run_dir=killed", "model.lora.merge=true", folder=folder, imported=IMPORTED)
    assert ended.status == 0, ended.err
    assert "ranks: 2 → 1" in ended.out
    whole, parts = ([without_measurements(line) for line in metrics(folder / name)] for name in ("whole", "killed"))
    assert len(whole) == len(parts)
    for wanted, found in zip(whole, parts, strict=True):
        assert found.get("eval", found)["loss"] == pytest.approx(wanted.get("eval", wanted)["loss"], rel=1e-9)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "killed", dtype=torch.float64)
    assert not (folder / "killed" / "adapter_config.json").exists()
    last = evaluations_of(folder / "killed")[-1]["loss"]
    assert loss_of(merged, folder / "killed") == pytest.approx(last, rel=1e-6)
    shutil.copytree(folder / "llama", folder / "moved")
    evaluating = ("-m", "distaccum.evaluate", "killed", "model.name_or_path=moved")
    evaluated = forking.run(*evaluating, folder=folder, imported=IMPORTED)
    assert evaluated.status == 0, evaluated.err
    assert float(evaluated.out.splitlines()[-1].split()[-3]) == pytest.approx(last, rel=1e-3)


def test_checkpoints_hold_the_adapters_alone(folder: Path, unbroken: forking.Ended) -> None:
    newest = read_checkpoint(checkpoints_in(folder / "whole" / "checkpoints")[0])
    assert all(is_adapter(name) for name in newest.manifest["tensors"] if name.startswith("model/"))
    assert len(newest.frozen) == 21
    shutil.copytree(folder / "llama", folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, folder / "other" / "model.safetensors", {"format": "pt"})
    words = ("run_dir=whole", "strategy=single", "train.epochs=3", "model.name_or_path=other", "data.tokenizer=llama")
    ended = forking.run(*LORA, *words, folder=folder, imported=IMPORTED)
    assert "leaves out 21 frozen weights" in ended.message
    assert "some are others here: model.norm.weight (fingerprint: float64" in ended.message


def test_the_section_of_a_command_line() -> None:
    given = ["experiment=finetune", "model.name_or_path=a", "data.files=b"]
    config: Any = compose([*given, "model.lora.rank=8", "model.lora.targets=[q_proj]"])
    assert (config.model.lora.rank, config.model.lora.targets) == (8, ["q_proj"])
    assert config.model.lora.alpha is None
    for wrong in ("rank=-1", "dropout=1", "targets=[]", "targets=3", "ranks=8"):
        with pytest.raises(UserError, match=r"model\.lora"):
            compose([*given, f"model.lora.{wrong}"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["nothing"]}, r"model\.lora: peft refuses: Target modules .* not found"),
        ({"targets": ["embed_tokens"], "merge": True}, "the adapter of model.embed_tokens, a Embedding, can't be"),
        ({"targets": ["lm_head"], "merge": True}, "the weights of lm_head are another layer's too"),
    ],
)
def test_refused(lora: dict[str, Any], message: str) -> None:
    model = tiny_language_model.model_of(tiny_language_model.config_of(tie_word_embeddings=True))
    with pytest.raises(UserError, match=message):
        add_adapters(model, LoraConfig(rank=2, **lora), "base")


def test_adapters_of_random_weights_are_refused(folder: Path) -> None:
    model = causal_lm(str(folder / "llama"), vocab_size=320, max_length=48, from_config=True, lora={"rank": 2})
    with pytest.raises(UserError, match="adapters of random weights that nobody has"):
        check_exported(model, None)
    check_exported(model, "llama")
    with torch.device("meta"), pytest.raises(UserError, match=r"model\.init_from, and set model\.from_config=true"):
        causal_lm(str(folder / "llama"), vocab_size=320, max_length=48)


def test_what_would_not_be_saved_is_refused() -> None:
    model = tiny_language_model.model_of(tiny_language_model.config_of())
    add_adapters(model, LoraConfig(rank=2), "base")
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"model\.unfreeze"):
        check_exported(model, None)


def test_no_rank_needs_to_hold_all_of_its_base(folder: Path) -> None:
    """Built without memory, and its base read by parts; it goes on as a whole model, and is evaluated."""
    shutil.copytree(folder / "llama", folder / "sizes", ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["model.name_or_path=sizes", "model.from_config=true", "model.init_from=llama", "train.epochs=null"]
    command = (*LORA, "schedule=constant", *words)
    fsdp = ("strategy=fsdp", "model.init_on_meta=true", "train.max_updates=2")
    for more, ranks in (
        (("run_dir=one", "train.max_updates=4"), 1),
        (("run_dir=parts", *fsdp), 2),
        (("run_dir=parts", "train.max_updates=4"), 1),
    ):
        ended = forking.run(*command, *more, ranks=ranks, folder=folder, imported=IMPORTED)
        assert ended.status == 0, ended.err
    one, parts = ([line for line in metrics(folder / name) if "eval" not in line] for name in ("one", "parts"))
    assert [line["update"] for line in parts] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in parts] == pytest.approx([line[key] for line in one], rel=1e-9)
    adapter = json.loads((folder / "parts" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "llama")
    assert len(read_checkpoint(checkpoints_in(folder / "parts" / "checkpoints")[0]).frozen) == 21
    evaluated = forking.run("-m", "distaccum.evaluate", "parts", folder=folder, imported=IMPORTED)
    assert evaluated.status == 0, evaluated.err
    last = evaluations_of(folder / "parts")[-1]["loss"]
    assert float(evaluated.out.splitlines()[-1].split()[-3]) == pytest.approx(last, rel=1e-3)
