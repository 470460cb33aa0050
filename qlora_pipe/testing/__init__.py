"""For the tests of plugin authors, and our own: tiny checkpoints, models from weights, and what a plugin must keep."""

from qlora_pipe.skeleton.toy import ARCHITECTURE as TOY
from qlora_pipe.testing.architecture import Conformance, check_architecture
from qlora_pipe.testing.checkpoints import byte_tokenizer, filled, tiny_checkpoint, write_tokenizer
from qlora_pipe.testing.commands import Ended, RunCli
from qlora_pipe.testing.dataset import check_dataset
from qlora_pipe.testing.subject import BrokenPromise
from qlora_pipe.testing.weights import drawn_weights, tiny_weights

__all__ = [
    "TOY",
    "BrokenPromise",
    "Conformance",
    "Ended",
    "RunCli",
    "byte_tokenizer",
    "check_architecture",
    "check_dataset",
    "drawn_weights",
    "filled",
    "tiny_checkpoint",
    "tiny_weights",
    "write_tokenizer",
]
