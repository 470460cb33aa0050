"""Generate: continue a text with a model, or let one answer it, with an adapter left unmerged."""

from collections.abc import Callable, Iterator

import pluggy

from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, missing_part
from qlora_pipe.config import GenerateConfig
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.generate import EagerSteps, generate, generate_seq2seq, require_one_way, stream_text
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture
from qlora_pipe.stages.load import choose_device, choose_dtype, load, note_slow_kernels


def continue_text(
    model: Checkpoint | QuantizedCheckpoint,
    prompt: str,
    config: GenerateConfig,
    *,
    manager: pluggy.PluginManager,
    adapter: Adapter | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, the prompt left out.

    The prompt is fed as it is, after the tokenizer's BOS; an encoder-decoder model reads it as its source, which EOS
    ends. `note` takes sentences for the user. Raises DataError where the adapter does not fit, UsageProblem where
    settings contradict each other.
    """
    require_one_way(beams=config.beams, temperature=config.temperature)
    if (fault := missing_part(model, adapter)) is not None:
        note(fault)
    architecture = find_architecture(manager, model.config.get("model_type"), config=model.config)
    tokenizer = Tokenizer.open(model.path)
    device = choose_device(config.device)
    note_slow_kernels(device, note)
    loaded = load(
        model,
        architecture,
        dtype=choose_dtype(config.dtype, device, architecture),
        device=device,
        adapter=adapter,
        residency=config.residency,
        note=note,
    )
    yield from answer(loaded, tokenizer, prompt, config)


def answer(loaded: LoadedModel, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> Iterator[str]:
    """Yield the continuation of a prompt by a loaded model, or an encoder-decoder model's answer to it."""
    ids, _ = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    stop_ids = loaded.stop_ids | {tokenizer.eos_id}
    if loaded.architecture.kind == "seq2seq":
        source = [*ids, tokenizer.eos_id]
        loaded.require_ids(source)
        yield from stream_text(
            tokenizer,
            generate_seq2seq(
                loaded.seq2seq,
                source,
                max_new_tokens=config.max_new_tokens,
                stop_ids=stop_ids,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed,
                beams=config.beams,
                length_penalty=config.length_penalty,
            ),
        )
        return
    loaded.require_ids(ids)
    new_ids = generate(
        loaded.causal,
        ids,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        beams=config.beams,
        length_penalty=config.length_penalty,
        # A captured step knows nothing of blocks that come and go.
        steps=EagerSteps(loaded.causal) if loaded.residency.way == "streamed" else None,
    )
    yield from stream_text(tokenizer, new_ids, prompt=ids)
