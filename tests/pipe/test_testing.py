"""What plugin authors are given for their tests."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.testing import tiny_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tiny_checkpoint_is_the_same_each_time_and_another_for_another_seed(tmp_path: Path) -> None:
    one, same, other = (
        contents(tiny_checkpoint(tmp_path / name, seed=seed)) for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    )
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tiny_checkpoint_holds_the_type_and_the_fields_it_was_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path, dtype=dtype, tie_word_embeddings=True, head_dim=6, num_key_value_heads=None)
    config = json.loads((folder / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    assert "num_key_value_heads" not in config
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert "lm_head.weight" not in weights
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (4 * 6, 32)


def test_the_tokenizer_of_a_tiny_checkpoint_reads_any_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(tiny_checkpoint(tmp_path))
    text = "Zoë  saw\n日本 🐈 </s>"
    ids, _ = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode([1, *ids, 2]) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 259)
