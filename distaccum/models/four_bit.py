"""Linear layers whose frozen weights are 4-bit numbers, quantised by bitsandbytes (QLoRA; Dettmers et al. 2023)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.errors import UserError, require

logger = logging.getLogger(__name__)

_CODES = 256
"""Numbers that a byte can stand for, and scales that share a scale of their own."""
_KERNELS_FOR = (torch.float32, torch.bfloat16, torch.float16)


def loading_options(name: str, config: Any, load_in_4bit: bool) -> dict[str, Any]:
    """Returns what makes `from_pretrained` of transformers quantise one linear layer after another as it reads them.

    They are quantised on the CPU, where the same weights give the same bytes on every machine.

    Args:
        name: of the model, for messages.
        config: transformers' of the model, by which it may be saved in 4 bits already.
        load_in_4bit: as for `causal_lm`; if it is false, there are no options.

    Raises:
        UserError: bitsandbytes is missing, or the model is saved in a quantised format that isn't asked for.
    """
    is_quantised = _is_quantised(name, config, load_in_4bit)
    if not load_in_4bit:
        return {}
    # It says on machines without GPUs that kernels for them are missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            'model.load_in_4bit=true needs bitsandbytes, which is missing: pip install "distaccum[bnb]".'
        ) from error
    options: dict[str, Any] = {"device_map": {"": "cpu"}}
    if is_quantised:
        return options
    # The scales are quantised too, but by FourBitLinear.
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)  # type: ignore[no-untyped-call]
    return {**options, "quantization_config": how}


def taken_over(module: Any) -> Any:
    """Replaces bitsandbytes' layers in a model, in place, and what transformers knows of them; returns the model.

    Adapters are put into the model before, as peft knows bitsandbytes' layers.

    Raises:
        UserError: the model has none.
    """
    from bitsandbytes.nn.modules import Linear4bit

    layers = {name: part for name, part in module.named_modules() if isinstance(part, Linear4bit)}
    if not layers:
        raise UserError(
            f"model.load_in_4bit=true: {type(module).__name__} has no linear layers to quantise. Leave it out."
        )
    # Else transformers refuses to cast the model.
    module.hf_quantizer.remove_quantization_config(module)
    module.is_loaded_in_4bit = False
    for name, layer in layers.items():
        module.set_submodule(name, FourBitLinear(layer))
    made = [part for part in module.modules() if isinstance(part, FourBitLinear)]
    weights = sum(part.in_features * part.out_features for part in made)
    others = sum(p.numel() for p in module.parameters() if not p.requires_grad and p.dtype is not torch.uint8)
    logger.info(
        "model.load_in_4bit: %d layers, %.1f %% of the frozen parameters, are %.3g MB in place of %.3g in bfloat16",
        *(len(made), 100 * weights / (weights + others)),
        *(sum(part.nbytes for part in made) / 1e6, 2 * weights / 1e6),
    )
    return module


def _is_quantised(name: str, config: Any, load_in_4bit: bool) -> bool:
    """Returns whether a model was saved in 4 bits.

    Raises:
        UserError: it was and that isn't asked for, or it was saved in another quantised format.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    found = found if isinstance(found, Mapping) else found.to_dict()
    is_of_4_bits = bool(found.get("load_in_4bit") or found.get("_load_in_4bit"))
    require(
        is_of_4_bits,
        f"model.name_or_path={name} is quantised by {found.get('quant_method')}, in a format that is not supported. "
        "Give the model that it was made of.",
    )
    require(
        load_in_4bit,
        f"model.name_or_path={name} holds weights of 4 bits, which can't be trained: set model.load_in_4bit=true and "
        "model.lora.rank, or give the model that it was made of.",
    )
    return True


class FourBitLinear(nn.Module):
    """y = W x + b, where W is kept in 4 bits a number, and multiplied out again in each forward and backward.

    A number of a block of 64 is one of 16 codes, times the block's scale; scales are bytes, which stand for 256 numbers
    times a scale of 256 of them, and an offset. All of that are frozen parameters of bytes, without a floating-point
    format, so that what moves, sends, shards, saves and compares a model's weights needs to know nothing of it.

    It computes in the format that autocast says, or of its input, which may be float64. bitsandbytes' own layer keeps
    the format of its first input, computes nothing in float64, and in evaluations on some CPUs rounds its scales for
    good.

    Attributes:
        weight: two numbers a byte [⌈out · in / 2⌉, 1].
        scales: a byte a block [blocks].
        scales_of_scales: bytes of float32 numbers: what the bytes of `scales` stand for [256], the scales of 256 of
            them each, and the offset.
        bias: [out], or None.

    Args:
        layer: bitsandbytes' quantised layer.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    scales_of_scales: nn.Parameter

    def __init__(self, layer: Any) -> None:
        super().__init__()
        state = layer.weight.quant_state
        self.out_features, self.in_features = state.shape
        self._block_size, self._kind = state.blocksize, state.quant_type
        if state.nested:  # a model that was saved in 4 bits
            scales, above, offset = state.absmax, state.state2, state.offset
        else:
            from bitsandbytes.functional import quantize_blockwise

            # bitsandbytes takes the mean, whose last bits depend on the number of threads.
            offset = state.absmax.median()
            scales, above = quantize_blockwise(state.absmax - offset, blocksize=_CODES)
        self._scales_block_size = above.blocksize
        numbers = torch.cat([above.code.float(), above.absmax.float(), offset.float().reshape(1)])
        self.weight = _bytes(layer.weight.data.clone())
        self.scales = _bytes(scales)
        self.scales_of_scales = _bytes(numbers.view(torch.uint8))
        self.bias = layer.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return self.weight.nbytes + self.scales.nbytes + self.scales_of_scales.nbytes

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), self.weight, self.scales, self.scales_of_scales, self._layout
        )
        return product if self.bias is None else product + self.bias.to(dtype)

    def multiplied_out(self, dtype: torch.dtype) -> Tensor:
        """Returns the weights [out, in]."""
        return _multiplied_out(self.weight, self.scales, self.scales_of_scales, self._layout, dtype)

    @property
    def _layout(self) -> _Layout:
        return (self.out_features, self.in_features), self._block_size, self._scales_block_size, self._kind


_Layout = tuple[tuple[int, int], int, int, str]
"""Shape of the weights, numbers of a block, scales of a block, and bitsandbytes' name of the codes."""


def _bytes(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _multiplied_out(packed: Tensor, scales: Tensor, above: Tensor, layout: _Layout, dtype: torch.dtype) -> Tensor:
    shape, block_size, scales_block_size, kind = layout
    numbers = above.view(torch.float32)
    codes, scales_of_scales, offset = numbers[:_CODES], numbers[_CODES:-1], numbers[-1]
    operators = torch.ops.bitsandbytes
    found = operators.dequantize_blockwise(scales, scales_of_scales, codes, scales_block_size, torch.float32)
    kernel_dtype = dtype if dtype in _KERNELS_FOR else torch.float32
    # As a single row: of matrices whose rows end within a block, the kernel for CPUs takes other blocks' scales.
    flat = operators.dequantize_4bit(packed, found + offset, block_size, kind, [1, math.prod(shape)], kernel_dtype)
    return flat.view(shape).to(dtype)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """x Wᵀ, which keeps W for the backward as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, above: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(packed, scales, above)
        ctx.layout = layout
        return nn.functional.linear(x, _multiplied_out(packed, scales, above, layout, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales, above = ctx.saved_tensors
        return gradient @ _multiplied_out(packed, scales, above, ctx.layout, gradient.dtype), None, None, None, None
