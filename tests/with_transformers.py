"""Imports what runs with models of transformers import, for `forking.start(…, imported=("with_transformers",))`."""

from distaccum.runtime.torchvision_operators import tolerate_missing_operators

tolerate_missing_operators()

import peft  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
