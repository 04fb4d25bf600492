"""Tasks: a loss as a sum, what it is averaged over, and metrics. Any callable of the same form can take their place."""

from distaccum.accumulation.result import LossTerm, TaskOutput, as_number, checked_output
from distaccum.tasks.base import CoupledTask, Task, weights_of
from distaccum.tasks.causal_lm import CausalLM
from distaccum.tasks.contrastive import Contrastive
from distaccum.tasks.cross_entropy import Classification, LanguageModeling, Segmentation
from distaccum.tasks.dice import Dice
from distaccum.tasks.mixture_lm import MixtureLM
from distaccum.tasks.sums import SumsTask

__all__ = [
    "CausalLM",
    "Classification",
    "Contrastive",
    "CoupledTask",
    "Dice",
    "LanguageModeling",
    "LossTerm",
    "MixtureLM",
    "Segmentation",
    "SumsTask",
    "Task",
    "TaskOutput",
    "as_number",
    "checked_output",
    "weights_of",
]
