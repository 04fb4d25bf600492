"""Packed windows give the updates of padded ones in one shot, however they are placed. Float64, to 1e-12."""

from __future__ import annotations

import functools

from examples import RaggedTokens
from packing import ForTransformers, assert_equal, from_transformers, gpt

from distaccum.runtime.world import World
from distaccum.tasks import CausalLM, LanguageModeling


def check_gpt(world: World) -> None:
    assert_equal(world, gpt, LanguageModeling(), RaggedTokens())


def check_llama_and_gpt2_of_transformers(world: World) -> None:
    if world.world_size > 2:
        return  # two ranks have shown it, and importing transformers takes seconds of each
    for kind in ("llama", "gpt2"):
        assert_equal(world, functools.partial(from_transformers, kind), CausalLM(), ForTransformers(), budgets=(20,))
