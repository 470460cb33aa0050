"""Generate: continue a text with a model, or let one answer it, with an adapter left unmerged."""

from collections.abc import Callable, Iterator

import pluggy

from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, missing_part
from qlora_pipe.config import GenerateConfig
from qlora_pipe.data.prompt import Prompt, chat_prompt, plain_prompt
from qlora_pipe.data.render import Turn
from qlora_pipe.data.templates import Templates, checkpoint_template
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import UsageProblem
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

    The prompt is fed as it is, after the tokenizer's BOS, or with `config.chat` as a user's turn through the chat
    template: the adapter's where it carries one, else the model's. An encoder-decoder model reads it as its source.
    `note` takes sentences for the user. Raises DataError where the adapter does not fit or the template refuses the
    turn, UsageProblem where settings contradict each other.
    """
    require_one_way(beams=config.beams, temperature=config.temperature)
    if not config.chat and (config.system is not None or config.template != "auto"):
        raise UsageProblem("--system and --template belong to a conversation: add --chat.")
    if (fault := missing_part(model, adapter)) is not None:
        note(fault)
    architecture = find_architecture(manager, model.config.get("model_type"), config=model.config)
    tokenizer = Tokenizer.open(model.path)
    if config.chat:
        folder = model.path
        if adapter is not None and checkpoint_template(adapter.path) is not None:
            folder = adapter.path
        templates = Templates.open(folder, tokenizer, choice=config.template, manager=manager)
        turns = [Turn("system", config.system)] if config.system is not None else []
        asked = chat_prompt([*turns, Turn("user", prompt)], templates=templates, tokenizer=tokenizer)
    else:
        asked = plain_prompt(prompt, tokenizer)
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
    pieces = _continued(loaded, tokenizer, asked, config)
    yield from _begun_with_a_word(pieces) if config.chat else pieces


def answer(loaded: LoadedModel, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> Iterator[str]:
    """Yield the continuation of a text by a loaded model, or an encoder-decoder model's answer to it."""
    return _continued(loaded, tokenizer, plain_prompt(prompt, tokenizer), config)


def _begun_with_a_word(pieces: Iterator[str]) -> Iterator[str]:
    """Leave out the space that templates put before an answer."""
    begun = False
    for piece in pieces:
        said = piece if begun else piece.lstrip()
        begun = begun or bool(said)
        if said:
            yield said


def _continued(loaded: LoadedModel, tokenizer: Tokenizer, prompt: Prompt, config: GenerateConfig) -> Iterator[str]:
    stop_ids = loaded.stop_ids | prompt.stop_ids
    if loaded.architecture.kind == "seq2seq":
        # As a source stands in training.
        source = [*prompt.ids, *tokenizer.behind]
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
    loaded.require_ids(prompt.ids)
    new_ids = generate(
        loaded.causal,
        prompt.ids,
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
    yield from stream_text(tokenizer, new_ids, prompt=prompt.ids)
