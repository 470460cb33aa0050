"""Generation: tokens one at a time, from a model with a key-value cache, and their text as it becomes certain."""

from qlora_pipe.generate.decoding import generate, generate_seq2seq, require_one_way, steps_of
from qlora_pipe.generate.graph import CapturedSteps
from qlora_pipe.generate.readers import CausalModel
from qlora_pipe.generate.steps import EagerSteps, Steps
from qlora_pipe.generate.streaming import Detokenizer, stream_text

__all__ = [
    "CapturedSteps",
    "CausalModel",
    "Detokenizer",
    "EagerSteps",
    "Steps",
    "generate",
    "generate_seq2seq",
    "require_one_way",
    "steps_of",
    "stream_text",
]
