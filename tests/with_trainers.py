"""Imports what trainers of others import, for `forking.run(…, imported=("with_trainers",))`."""

import os
import warnings

# What is forked must not have threads, and pyarrow's allocator starts one.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

from distaccum.runtime.torchvision_operators import tolerate_missing_operators

tolerate_missing_operators()
warnings.filterwarnings("ignore")

import lightning  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401
import trl.trainer.sft_trainer  # noqa: E402, F401
