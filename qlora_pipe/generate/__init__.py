"""Generation: tokens one at a time, from a model with a key-value cache, and their text as it becomes certain."""

from qlora_pipe.generate.decoding import CausalModel, generate
from qlora_pipe.generate.streaming import Detokenizer, stream_text

__all__ = ["CausalModel", "Detokenizer", "generate", "stream_text"]
