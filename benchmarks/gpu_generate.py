"""Generation at batch 1 on a GPU: tokens/s, against the memory's bandwidth and transformers + bitsandbytes.

    python benchmarks/gpu_generate.py [--quick] [--profile]

LLaMA 8B and 70B shapes with random weights made on the GPU, NF4 with double quantization, embedding and head in
bfloat16. "bound" is what the bytes of the weights that a token needs would take at the speed of a device copy (bytes
read and written) measured in the same run; "first" is the first token's time, "new tok/s" the pace of a text whose
step is yet to be captured, "peak" our memory alone. The peer generates the 8B shape, sdpa, in turn with ours.
`--profile` prints what the time of a replayed step goes to. Writes results/gpu_generate.json after each row.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpu import ceilings, require_gpu
from hollow import SHAPES, Shape
from report import publish
from torch import nn

from qlora_kernels import QuantizedTensor, quantize
from qlora_pipe.generate import CapturedSteps, Steps, generate
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.nn.linear import QuantizedLinear, linear_modules, replace_module, share_scratch
from qlora_plugins.llama import build

PROMPT = 128
_HEAD_SIZE = 128


def config_of(shape: Shape) -> dict[str, Any]:
    """The config.json of a LLaMA 3 of this shape."""
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // _HEAD_SIZE,
        "num_key_value_heads": shape.key_value // _HEAD_SIZE,
        "head_dim": _HEAD_SIZE,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    }


def random_weight(outputs: int, inputs: int, *, device: torch.device) -> QuantizedTensor:
    """Random codes and scales of a plausible size, as no quantizer would make them but a kernel reads them."""
    model = quantize(torch.randn(64, 256))
    n_blocks = outputs * inputs // 64
    scale = 2.5 * inputs**-0.5
    tables = {name: getattr(model, name).to(device) for name in ("levels", "nested_levels")}
    return model._replace(
        codes=torch.randint(256, (outputs * inputs // 2,), dtype=torch.uint8, device=device),
        absmax=torch.randint(256, (n_blocks,), dtype=torch.uint8, device=device),
        nested_absmax=torch.full((-(-n_blocks // 256),), scale / 2, device=device),
        offset=torch.tensor(scale, device=device),
        shape=(outputs, inputs),
        **tables,
    )


def our_model(shape: Shape, *, device: torch.device) -> DecoderModel:
    """Build it with random weights, made where they are used."""
    with torch.device("meta"):
        model = build(config_of(shape))
    for path, layer in linear_modules(model).items():
        if path != "lm_head":
            weight = random_weight(layer.out_features, layer.in_features, device=device)
            replace_module(model, path, QuantizedLinear(weight))
    _fill(model, device)
    share_scratch(model)
    return model.eval().requires_grad_(False)


def peer_model(shape: Shape, *, device: torch.device) -> Any:
    """Build transformers' model of the shape, its linear layers quantized by bitsandbytes from random weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = TheirConfig(**config_of(shape), attn_implementation="sdpa", bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            dense = torch.randn(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=device)
            packed = Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = Params4bit(dense * layer.in_features**-0.5, requires_grad=False, quant_type="nf4")
            replace_module(model, path, packed.to(device))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    _fill(model, device)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, device: torch.device) -> None:
    """Give every parameter that is still on the meta device random values in bfloat16; norms one."""
    for name, weight in list(model.named_parameters()):
        if weight.is_meta:
            made = torch.ones(weight.shape, dtype=torch.bfloat16, device=device)
            if weight.dim() > 1:
                made.normal_(0, weight.shape[1] ** -0.5)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))


def bytes_per_token(model: DecoderModel) -> int:
    """What of the weights is read for a token: all but the embedding, of which it is one row."""
    packed = sum(buffer.nbytes for buffer in model.buffers())
    dense = sum(weight.nbytes for name, weight in model.named_parameters() if "embed_tokens" not in name)
    return packed + dense


def text_of(model: DecoderModel, prompt: list[int], count: int, steps: Steps) -> tuple[float, float]:
    """Seconds to the first token of a text, and from there to the last."""
    start = time.perf_counter()
    tokens = generate(model, prompt, max_new_tokens=count, stop_ids=(), steps=steps)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - start, time.perf_counter() - first


def peer_text(model: Any, prompt: list[int], count: int) -> float:
    """Seconds of all tokens but the first, as the difference of two texts."""

    def seconds(n: int) -> float:
        ids = torch.tensor([prompt], device=model.device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds(count) - seconds(1)


def measure(
    name: str, model: DecoderModel, peer: Any | None, *, count: int, rounds: int, bandwidth: float, peak: int
) -> dict[str, object]:
    """One row: medians over rounds, ours and the peer in turn; `bandwidth` in bytes a second, `peak` in bytes."""
    draws = torch.Generator().manual_seed(count)
    prompt = torch.randint(1000, (PROMPT,), generator=draws).tolist()
    steps = CapturedSteps(model)
    fresh = sum(text_of(model, prompt, count, steps))
    ours, theirs = [], []
    if peer is not None:
        peer_text(peer, prompt, 4)
    for _ in range(rounds):
        ours.append(text_of(model, prompt, count, steps))
        if peer is not None:
            theirs.append(peer_text(peer, prompt, count))
    pace = statistics.median(rest for _, rest in ours) / (count - 1)
    bound = bytes_per_token(model) / bandwidth
    row: dict[str, object] = {
        "shape": name,
        "new tokens": count,
        "ours tok/s": 1 / pace,
        "bound tok/s": 1 / bound,
        "of the bound": bound / pace,
        "first ms": 1e3 * statistics.median(first for first, _ in ours),
        "new tok/s": count / fresh,
        "fastest": (count - 1) / min(rest for _, rest in ours),
        "slowest": (count - 1) / max(rest for _, rest in ours),
        "peak GiB": peak / 2**30,
        "peer tok/s": "",
        "times the peer": "",
    }
    if theirs:
        peer_pace = statistics.median(theirs) / (count - 1)
        row |= {"peer tok/s": 1 / peer_pace, "times the peer": peer_pace / pace}
    return row


def print_profile(model: DecoderModel) -> None:
    """Print what the GPU does in ten replayed steps, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    steps = CapturedSteps(model)
    tokens = generate(model, list(range(PROMPT)), max_new_tokens=64, stop_ids=(), steps=steps)
    for _ in range(8):
        next(tokens)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            next(tokens)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--profile", action="store_true", help="print what a step's time goes to")
    options = parser.parse_args()
    require_gpu()
    device = torch.device("cuda")
    bandwidth = ceilings().copy_gb_per_s * 1e9
    counts, rounds = ((128,), 2) if options.quick else ((128, 512), 5)
    peers: Mapping[str, Callable[[], Any]] = {"8B": lambda: peer_model(SHAPES["8B"], device=device)}
    rows: list[dict[str, object]] = []
    for name in ("8B", "70B"):
        model = our_model(SHAPES[name], device=device)
        torch.cuda.reset_peak_memory_stats()
        # Kernels are compiled in a text that is not timed.
        text_of(model, list(range(PROMPT)), max(counts), CapturedSteps(model))
        peak = torch.cuda.max_memory_allocated()
        peer = peers[name]() if name in peers else None
        for count in counts:
            rows.append(measure(name, model, peer, count=count, rounds=rounds, bandwidth=bandwidth, peak=peak))
            publish("gpu_generate", rows=rows, peers=("triton", "transformers", "bitsandbytes"))
        if options.profile:
            print_profile(model)
        del model, peer
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
