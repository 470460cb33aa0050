"""Make the demo's base model and dataset from nothing: `python -m qlora_pipe.demo.rebuild OUT`.

It writes OUT/base, a LLaMA checkpoint, and OUT/skill.jsonl. The same seed gives the same bytes on one machine with one
number of threads; the bytes that ship with the project were made with the defaults.
"""

from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save
from tokenizers import Tokenizer

from qlora_formats.commit import write_file
from qlora_formats.strict_json import pretty
from qlora_pipe.demo.corpus import tales
from qlora_pipe.demo.pretrain import Recipe, new_model, pretrain
from qlora_pipe.demo.skill import as_jsonl, rows
from qlora_pipe.demo.tokenization import BOS, BOS_ID, EOS, EOS_ID, UNKNOWN, learn_tokenizer
from qlora_pipe.plugins import find_architecture, load_plugins

SEED = 0
ROWS = 1500
STEPS = 1500
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "torch_dtype": "bfloat16",
}
GENERATION = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": UNKNOWN,
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
}


def make_weights(tokenizer: Tokenizer, texts: list[str], *, seed: int, threads: int) -> dict[str, torch.Tensor]:
    """Train a model on the texts, and give its weights in bfloat16, named as in a checkpoint."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    architecture = find_architecture(load_plugins(), CONFIG["model_type"])
    model = new_model(architecture, CONFIG)
    ids = [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(texts)]
    with click.progressbar(length=STEPS, label="base model") as bar:
        pretrain(model, ids, recipe=Recipe(steps=STEPS), pad_id=EOS_ID, seed=seed, report=lambda *_: bar.update(1))
    tied = architecture.ties(CONFIG)
    return {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in sorted(model.state_dict().items())
        if name not in tied
    }


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=SEED, show_default=True, help="Seed of the texts, the first weights and the rows.")
@click.option("--threads", default=2, show_default=True, help="CPU threads; the last bits depend on their number.")
def main(out: Path, seed: int, threads: int) -> None:
    """Train the demo's base model, write it to OUT/base, and its dataset to OUT/skill.jsonl."""
    if out.exists() and any(out.iterdir()):
        raise click.ClickException(f"{out} is not empty; name a folder that is, or a new one.")
    texts = list(tales(seed=seed, count=STEPS * Recipe(steps=STEPS).batch_size))
    tokenizer = learn_tokenizer(texts, size=CONFIG["vocab_size"])
    weights = make_weights(tokenizer, texts, seed=seed, threads=threads)
    write_file(out / "base" / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_file(out / "base" / "tokenizer.json", tokenizer.to_str().encode())
    write_file(out / "base" / "tokenizer_config.json", pretty(TOKENIZER))
    write_file(out / "base" / "generation_config.json", pretty(GENERATION))
    write_file(out / "base" / "config.json", pretty(CONFIG))
    write_file(out / "skill.jsonl", as_jsonl(rows(seed=seed, count=ROWS)))


if __name__ == "__main__":
    main()
