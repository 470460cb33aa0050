"""The conformance suite with transformers as the reference, as docs/plugins.md says it is done."""

from dataclasses import replace

import pytest

from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.testing import BrokenPromise, check_architecture
from tests.pipe.documented import example


def test_llama_agrees_with_the_documented_reference() -> None:
    llama, reference = find_architecture(load_plugins(), "llama"), example("against_transformers").reference
    assert check_architecture(llama, reference=reference).kept[-1] == "reference"
    # Another theta than the reference reads from the checkpoint.
    other = replace(llama, build=lambda config: llama.build({**config, "rope_theta": 9_000.0}))
    with pytest.raises(BrokenPromise, match="its logits are not the reference's"):
        check_architecture(other, reference=reference)
