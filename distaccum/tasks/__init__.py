"""Tasks: a loss as a sum, what it is averaged over, and metrics. Any callable of the same form can take their place."""

from distaccum.tasks.base import Task, TaskOutput
from distaccum.tasks.classification import Classification
from distaccum.tasks.language_modeling import LanguageModeling

__all__ = ["Classification", "LanguageModeling", "Task", "TaskOutput"]
