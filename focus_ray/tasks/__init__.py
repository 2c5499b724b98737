"""Checkable chat tasks without end: what ``sdar-tiny`` is trained and measured on.

Pure Python, no dependency. ``training_conversations(seed)`` yields conversations with reference
answers; ``evaluation_set()`` is a fixed list of held-out questions; ``Task.is_right`` judges an
answer. A question is on the training or the evaluation side by a hash of its text, so no evaluation
question can occur in training, whatever the seeds.
"""

from focus_ray.tasks.evaluation import EVALUATION_SEED, evaluation_set
from focus_ray.tasks.mixture import (
    CLOSED_SETS,
    TASKS,
    draw_task,
    draw_training_task,
    training_conversation,
    training_conversations,
)
from focus_ray.tasks.task import Check, Message, Task, final_answer

__all__ = [
    "CLOSED_SETS",
    "EVALUATION_SEED",
    "TASKS",
    "Check",
    "Message",
    "Task",
    "draw_task",
    "draw_training_task",
    "evaluation_set",
    "final_answer",
    "training_conversation",
    "training_conversations",
]
