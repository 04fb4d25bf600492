"""Makes the tables of docs/configuration.md from the schema: python tests/config_reference.py --write."""

from __future__ import annotations

import ast
import dataclasses
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from distaccum import config
from distaccum.config import components, language, optimizers, sources, vision
from distaccum.config import tools as tool_configs
from distaccum.config.lora import LoraConfig

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"
BEGIN = "<!-- made by tests/config_reference.py from the schema -->"
END = "<!-- end of what tests/config_reference.py made -->"

SECTIONS: list[tuple[str, str, type]] = [
    ("the run", "", config.TrainConfig),
    ("`batch`", "batch", config.BatchConfig),
    ("`batch=by_length`", "batch", config.ByLengthBatchConfig),
    ("`batch=packed`", "batch", config.PackedBatchConfig),
    ("`train`", "train", config.LoopConfig),
    ("`train.early_stopping`", "train.early_stopping", config.EarlyStoppingConfig),
    ("`train.ema`", "train.ema", config.EmaConfig),
    ("`train.swa`", "train.swa", config.SwaConfig),
    ("`insight`", "insight", config.InsightConfig),
    ("`checkpoint`", "checkpoint", config.CheckpointConfig),
    ("`distributed`", "distributed", config.DistributedConfig),
    ("`data`", "data", config.DataConfig),
    ("`data=coins`", "data", components.CoinsDataConfig),
    ("`data=text`", "data", components.TextDataConfig),
    ("`data=image_folder`", "data", vision.ImageFolderDataConfig),
    ("`data=webdataset`", "data", sources.WebDatasetDataConfig),
    ("`data=image_folder`, `webdataset`", "data", vision.ImageDataConfig),
    ("`data=language`", "data", language.LanguageDataConfig),
    ("`data=stream`", "data", sources.StreamDataConfig),
    ("`data=synthetic`", "data", components.SyntheticDataConfig),
    ("`data=jsonl`", "data", sources.RowsDataConfig),
    ("`data=parquet`", "data", sources.ParquetDataConfig),
    ("`data=hf_dataset`", "data", sources.HubDataConfig),
    ("`data=tokens`", "data", sources.TokensDataConfig),
    ("`data=mix`", "data", sources.MixDataConfig),
    ("`model=…`", "model", components.ModelConfig),
    ("`model=mlp`", "model", components.MLPConfig),
    ("`model=cnn`", "model", components.CNNConfig),
    ("`model=gpt`", "model", components.GPTConfig),
    ("`model=causal_lm`", "model", language.CausalLMConfig),
    ("`model.lora`", "model.lora", LoraConfig),
    ("`model=unet`", "model", components.UNetConfig),
    ("`model=encoder`", "model", components.EncoderConfig),
    ("`model=timm`", "model", vision.TimmConfig),
    ("`task=classification`", "task", components.ClassificationConfig),
    ("`task=language_modeling`", "task", components.LanguageModelingConfig),
    ("`task=causal_lm`", "task", language.CausalLMTaskConfig),
    ("`task=mixture_lm`", "task", language.MixtureLMConfig),
    ("`task=segmentation`", "task", components.SegmentationConfig),
    ("`task=dice`", "task", components.DiceConfig),
    ("`task=contrastive`", "task", components.ContrastiveConfig),
    ("`optim=…`", "optim", config.OptimConfig),
    ("`optim=…` of torch's", "optim", optimizers.TorchOptimConfig),
    ("`optim=sgd`, `momentum`, `nesterov`", "optim", optimizers.SGDConfig),
    ("`optim=adam`, `amsgrad`, `adamw`", "optim", optimizers.AdamConfig),
    ("`optim=adamw8bit`", "optim", optimizers.AdamW8bitConfig),
    ("`optim=lbfgs`", "optim", optimizers.LBFGSConfig),
    ("`optim=rmsprop`", "optim", optimizers.RMSpropConfig),
    ("`optim=adagrad`", "optim", optimizers.AdagradConfig),
    ("`optim=adadelta`", "optim", optimizers.AdadeltaConfig),
    ("`optim=radam`", "optim", optimizers.RAdamConfig),
    ("`optim=nadam`", "optim", optimizers.NAdamConfig),
    ("`optim=adamax`", "optim", optimizers.AdamaxConfig),
    ("`optim=asgd`", "optim", optimizers.ASGDConfig),
    ("`optim=adafactor`", "optim", optimizers.AdafactorConfig),
    ("`optim=rprop`", "optim", optimizers.RpropConfig),
    ("`optim=lion`", "optim", optimizers.LionConfig),
    ("`optim=muon`", "optim", optimizers.MuonConfig),
    ("`optim=schedule_free`", "optim", optimizers.ScheduleFreeConfig),
    ("`optim=schedule_free_sgd`", "optim", optimizers.ScheduleFreeSGDConfig),
    ("`schedule=…`", "schedule", config.ScheduleConfig),
    ("`schedule=linear`, `cosine`", "schedule", config.DecayScheduleConfig),
    ("`schedule=polynomial`", "schedule", config.PolynomialScheduleConfig),
    ("`schedule=wsd`", "schedule", config.WSDScheduleConfig),
    ("`schedule=step`", "schedule", config.StepScheduleConfig),
    ("`strategy=single`", "strategy", config.SingleConfig),
    ("`strategy=dp`", "strategy", config.DPConfig),
    ("`strategy=ddp`", "strategy", config.DDPConfig),
    ("`strategy=fsdp`", "strategy", config.FSDPConfig),
    ("`precision=fp32`, `bf16`, `bf16_params`, `fp64`", "precision", config.PrecisionConfig),
    ("`precision=fp16`", "precision", config.Fp16Config),
    ("`wandb`", "wandb", config.WandbConfig),
    ("`compare`", "compare", tool_configs.CompareSection),
    ("`check`", "check", tool_configs.CheckSection),
    ("`tune`", "tune", tool_configs.TuneSection),
    ("`memory`", "memory", tool_configs.MemorySection),
    ("`study`", "study", tool_configs.StudySection),
]


def field_docstrings() -> dict[str, dict[str, str]]:
    """Class → field → the docstring below it."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / "distaccum" / "config").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if not isinstance(node, ast.ClassDef):
                continue
            docs = found.setdefault(node.name, {})
            for entry, following in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and is_text:
                    docs[entry.target.id] = " ".join(str(following.value.value).split())
    return found


def reference() -> str:
    """The tables of all sections: a heading for each group, and one below it for each of its options."""
    docs = field_docstrings()
    lines, group = [BEGIN, ""], None
    for title, key, schema in SECTIONS:
        if key.partition(".")[0] != group:
            group = key.partition(".")[0]
            lines += [f"## `{group}`" if group else "## The run", ""]
        if "." in key or ("=" in title and "=…" not in title):
            lines += [f"### {title}", ""]
        lines += [" ".join((schema.__doc__ or "").split()), ""]
        rows = []
        for entry in dataclasses.fields(schema):
            if entry.name not in schema.__annotations__ or entry.name == "_target_":
                continue
            texts = (docs.get(parent.__name__, {}).get(entry.name) for parent in schema.__mro__)
            text = next((text for text in texts if text), None)
            if text is not None:
                path = f"{key}.{entry.name}" if key else entry.name
                rows.append(f"| `{path}` | {_default(entry)} | {text} |")
        if rows:
            lines += ["| key | default | meaning |", "| --- | --- | --- |", *rows, ""]
    lines.append(END)
    return "\n".join(lines)


def _default(entry: dataclasses.Field[Any]) -> str:
    if entry.default_factory is not dataclasses.MISSING:
        value = entry.default_factory()
    elif entry.default == config.MISSING or entry.default is dataclasses.MISSING:
        return "must be given"
    else:
        value = entry.default
    return f"`{_as_override(value)}`"


def _as_override(value: object) -> str:
    """As one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_as_override, value))}]"
    return str(value)


def written(page: str) -> str:
    """The page with its tables made anew."""
    start, stop = page.index(BEGIN), page.index(END) + len(END)
    return page[:start] + reference() + page[stop:]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(reference())
