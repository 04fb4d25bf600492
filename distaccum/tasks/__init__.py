"""Tasks: a loss as a sum, what it is averaged over, and metrics. Any callable of the same form can take their place."""

from distaccum.accumulation.result import LossTerm, TaskOutput, as_number, checked_output
from distaccum.tasks.base import CoupledTask, Task, weights_of
from distaccum.tasks.causal_lm import CausalLM
from distaccum.tasks.chunked_loss import HeadLoss, loss_in_head
from distaccum.tasks.contrastive import Contrastive
from distaccum.tasks.cross_entropy import Classification, LanguageModeling, Segmentation
from distaccum.tasks.dice import Dice
from distaccum.tasks.linear_cross_entropy import ChunkedLoss, linear_cross_entropy_sum
from distaccum.tasks.mixture_lm import MixtureLM
from distaccum.tasks.sums import SumsTask

__all__ = [
    "CausalLM",
    "ChunkedLoss",
    "Classification",
    "Contrastive",
    "CoupledTask",
    "Dice",
    "HeadLoss",
    "LanguageModeling",
    "LossTerm",
    "MixtureLM",
    "Segmentation",
    "SumsTask",
    "Task",
    "TaskOutput",
    "as_number",
    "checked_output",
    "linear_cross_entropy_sum",
    "loss_in_head",
    "weights_of",
]
