"""Any model of timm, by its name."""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from distaccum.errors import UserError, listed, require
from distaccum.runtime.memory import is_out_of_memory
from distaccum.runtime.torchvision_operators import tolerate_missing_operators

logger = logging.getLogger(__name__)

_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")


def timm_model(
    name: str,
    pretrained: bool = False,
    pretrained_file: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Makes a model by `timm.create_model`.

    Args:
        name: as timm has it (`resnet18`, `vit_tiny_patch16_224.augreg_in21k_ft_in1k`), or `local-dir:FOLDER`.
        pretrained: begin with timm's weights, which it downloads from a hub.
        pretrained_file: begin with those of a file (safetensors, or a `.pth` without code). All that the model has must
            be in it, but for a classifier of another number of classes, which begins at random.
        num_classes: number of outputs.
        in_chans: number of the image's channels; None: the first of `input_shape`, or else timm's own default.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of skipping a residual block, at the last one.
        arguments: further ones of the model's constructor.
        input_shape: of the data, `[channels, height, width]`. A model that takes one size only is made for this one.
        mean: of the data's normalisation, to be compared with that of the weights.
        std: as `mean`.

    Raises:
        UserError: timm can't be imported, there is no such model, it doesn't take the arguments, or the weights can't
            be loaded or don't fit.
    """
    timm = _timm()
    if num_classes is None:
        raise UserError(
            "model.num_classes is null, and the data doesn't say it: timm would take that of its weights. Set "
            "model.num_classes=…, or give the dataset an attribute num_classes."
        )
    given = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, **_of_input(timm, name, in_chans, input_shape)}
    # What says nothing is left out, as not every model takes a drop_path_rate.
    given = {"num_classes": num_classes, **{key: value for key, value in given.items() if value}, **(arguments or {})}
    if not pretrained and pretrained_file is None:
        return _created(timm, name, given)
    if pretrained_file is not None:
        require(Path(pretrained_file).is_file(), f"model.pretrained_file={pretrained_file} is not a file.")
    with _loaded_states() as states:
        model = _created(timm, name, given, loads=True, file=pretrained_file)
    config = getattr(model, "pretrained_cfg", None) or {}
    _check_loaded(name, states.get(id(model)), config)
    _compare_normalisation(name, config, mean, std)
    return model


def _created(
    timm: ModuleType, name: str, arguments: Mapping[str, Any], *, loads: bool = False, file: str | None = None
) -> nn.Module:
    """Returns the model, with weights if it `loads`: those of a file, or else of timm's hub."""
    overlay = {} if file is None else {"pretrained_cfg_overlay": {"file": file}}
    try:
        model: nn.Module = timm.create_model(name, pretrained=loads, **overlay, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model.name={name}: timm can't make it with {dict(arguments)}: {_short(error)}") from error
    except Exception as error:  # files and hubs fail in all kinds of ways
        if not loads or is_out_of_memory(error):
            raise
        source = file or "timm's hub (model.pretrained_file=… takes a local file)"
        raise UserError(f"model.name={name}: its weights can't be loaded from {source}: {_short(error)}") from error
    return model


def _timm() -> ModuleType:
    tolerate_missing_operators()
    try:
        import timm
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"model=timm needs timm, which cannot be imported ({type(error).__name__}: {error}). "
            "Install it: pip install 'distaccum[vision]'"
        ) from error
    found: ModuleType = timm
    return found


def _of_input(timm: ModuleType, name: str, in_chans: int | None, input_shape: Sequence[int] | None) -> dict[str, Any]:
    """Returns the arguments that the data's shape decides on.

    Raises:
        UserError: timm has no model of that name.
    """
    size: dict[str, Any] = {}
    is_elsewhere = name.startswith(_ELSEWHERE)
    if not is_elsewhere and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f"Near it: {', '.join(near)}." if near else "timm.list_models() lists them."
        raise UserError(f"model.name={name}: timm has no model of that name. {hint}")
    if input_shape is None or len(input_shape) != 3:
        return {"in_chans": in_chans}
    if not is_elsewhere:
        try:
            config = timm.get_pretrained_cfg(name)
        except RuntimeError as error:  # the model is there, with other weights
            tags = listed(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
            raise UserError(f"model.name={name}: timm has no such weights. There are: {tags}.") from error
        if config is not None and config.fixed_input_size:
            size["img_size"] = tuple(input_shape[1:])
    return {"in_chans": in_chans or input_shape[0], **size}


@contextmanager
def _loaded_states() -> Iterator[dict[int, Any]]:
    """Notes what each module's `load_state_dict` returned: timm doesn't say what it has found no weights for."""
    load, noted = nn.Module.load_state_dict, dict[int, Any]()

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        noted[id(module)] = result = load(module, *args, **kwargs)
        return result

    nn.Module.load_state_dict = noting  # type: ignore[method-assign, assignment]
    try:
        yield noted
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _check_loaded(name: str, result: Any, config: Mapping[str, Any]) -> None:
    """Logs what the weights had nothing for, and refuses it if that is more than the classifier."""
    if result is None:
        return  # loaded in a way of the model's own, which is strict
    heads = config.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    if missing := [key for key in result.missing_keys if not key.startswith(heads or ("\0",))]:
        raise UserError(
            f"model.name={name}: the weights hold nothing for {listed(missing)}, which would begin at random. Give the "
            "weights of this model."
        )
    if result.missing_keys:
        logger.info("%s begins with weights, but for %s, at random", name, listed(result.missing_keys))
    if result.unexpected_keys:
        logger.info("%s has no place for these weights: %s", name, listed(result.unexpected_keys))


def _compare_normalisation(
    name: str, config: Mapping[str, Any], mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    for key, of_data in (("mean", mean), ("std", std)):
        of_weights = config.get(key)
        if not of_weights or not isinstance(of_data, tuple | list):
            continue
        if tuple(of_weights) != tuple(of_data):
            numbers = ",".join(f"{value:g}" for value in of_weights)
            logger.info(
                "%s: its weights were trained with data.%s=[%s], and the data have %s", name, key, numbers, of_data
            )


def _short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 500)
