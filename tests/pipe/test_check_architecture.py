"""The conformance suite of architectures: good ones pass, and each promise that is broken is found and named."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from qlora_pipe.architecture import Architecture
from qlora_pipe.nn.cache import Cache
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.linear import LoraLinear
from qlora_pipe.nn.packing import Packing
from qlora_pipe.plugins import architectures, load_plugins
from qlora_pipe.skeleton.toy import ARCHITECTURE
from qlora_pipe.skeleton.toy.model import Block, Told, Toy, ToyConfig
from qlora_pipe.testing import BrokenPromise, check_architecture
from tests.pipe.seq2seq_toy import PAIR, Pair
from tests.pipe.seq2seq_toy import Cache as PairCache

BUILDS = itertools.count()


def toy(model: type[Toy] = Toy, *, change: Callable[[Any], None] = lambda _: None, **fields: Any) -> Architecture:
    """The toy family, built as `model` and changed then, with other fields."""

    def build(config: Mapping[str, Any]) -> Toy:
        made = model(ToyConfig.read(config))
        change(made)
        return made

    return replace(ARCHITECTURE, build=build, **fields)


def blocks_that(forward: Callable[[Block, Tensor, Told], Tensor], *, layer: int | None = None) -> Architecture:
    """The toy family with another forward in its blocks, or in one of them."""

    class Other(Block):
        def forward(self, x: Tensor, told: Told) -> Tensor:
            return forward(self, x, told)

    def change(made: Toy) -> None:
        for each in made.layers if layer is None else [made.layers[layer]]:
            each.__class__ = Other

    return toy(change=change)


def usual(block: Block, x: Tensor, told: Told) -> Tensor:
    return Block.forward(block, x, told)


def on_cpu(made: Toy) -> None:
    made.norm.weight = nn.Parameter(torch.ones(32, device="cpu"))


def with_table(made: Toy) -> None:
    made.register_buffer("table", torch.arange(4), persistent=False)


def with_attribute(made: Toy) -> None:
    made.layers[1].angles = torch.arange(4)


def silently_tied(made: Toy) -> None:
    made.lm_head.weight = made.embed_tokens.weight


def with_unused_linear(made: Toy) -> None:
    for block in made.layers:
        block.more_proj = nn.Linear(32, 32, bias=False)


def one_layer_for_all(made: Toy) -> None:
    for block in made.layers:
        block.layer = 0


def numbered(made: Toy) -> None:
    made.number = next(BUILDS)


class OneBlock(Toy):
    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self.layers[0]]


class Careless(Toy):
    """Takes whatever its config holds."""

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Careless":
        if config["num_hidden_layers"] < 1:
            raise ValueError("no layers")
        return Careless(ToyConfig.read(config))


class Numbered(Toy):
    def finish(self, state: Tensor) -> Tensor:
        return super().finish(state) + self.number / 8


class ReadsWeight(Toy):
    def finish(self, state: Tensor) -> Tensor:
        return super().finish(functional.linear(state, self.layers[0].o_proj.weight))


class Wide(Toy):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden).float()


class Blind(Toy):
    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Told]:
        return super().embed(torch.full_like(ids, 5), cache=cache, packing=packing)


class MoreThanBlocks(Toy):
    def hidden(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        return super().hidden(ids, cache=cache, packing=packing) * 1.01

    def hidden_of(self, inputs: Inputs) -> Tensor:
        return super().hidden_of(inputs) * 1.01


class ForgetsPacking(Toy):
    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Told]:
        state, told = super().embed(ids, cache=cache, packing=packing)
        return state, told._replace(packing=None)


class ForgetsPositions(Toy):
    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Told]:
        state, told = super().embed(ids, cache=cache, packing=packing)
        tables = self.config.rotary.tables(torch.arange(ids.shape[1]), length=ids.shape[1], like=state)
        return state, told._replace(cosines=tables[0], sines=tables[1]) if cache else told


class Boundless(Toy):
    @property
    def context(self) -> int:
        return 0


def remember(block: Block, x: Tensor, told: Told) -> Tensor:
    """The second block takes what the first one made from where it has left it."""
    after = usual(block, x, told)
    if block.layer == 0:
        LEFT["state"] = after
        return after
    return after + LEFT["state"] * 0.5


LEFT: dict[str, Tensor] = {}


def cut(block: Block, x: Tensor, told: Told) -> Tensor:
    return usual(block, x.detach() if x.is_leaf else x, told)


def count(block: Block, x: Tensor, told: Told) -> Tensor:
    """Each call gives something else in training."""
    block.calls = getattr(block, "calls", 0) + 1
    return usual(block, x, told) * (1 + 0.01 * block.calls * block.training)


def when_adapted(block: Block, x: Tensor, told: Told) -> Tensor:
    adapted = isinstance(block.o_proj, LoraLinear) and not block.training
    return usual(block, x, told) * (1.01 if adapted else 1)


def when_frozen(block: Block, x: Tensor, told: Told) -> Tensor:
    frozen = not any(part.requires_grad for part in block.parameters())
    return usual(block, x, told) * (1.01 if frozen and isinstance(block.o_proj, LoraLinear) else 1)


def when_packed_in_bits(block: Block, x: Tensor, told: Told) -> Tensor:
    return usual(block, x, told) * (1 if type(block.o_proj) is nn.Linear else 1.01)


CHAIN = {"lm_head.weight": "embed_tokens.weight", "embed_tokens.weight": "norm.weight"}
BROKEN: dict[str, tuple[Architecture, str]] = {
    "a text for a list": (toy(blocks="layers.*"), "whose blocks is 'layers.*'; it must be a list of texts"),
    "another task": (toy(task_type="SEQ_2_SEQ_LM"), "of a causal model it is CAUSAL_LM"),
    "another type": (toy(model_types=("other",)), "has the model_type 'toy', which is none of its model_types"),
    "a small vocabulary": (toy(tiny={**ARCHITECTURE.tiny, "vocab_size": 100}), "goes with it has 259 ids"),
    "packs a source": (replace(PAIR, packs=True), "which is for causal models alone"),
    "a module": (replace(ARCHITECTURE, build=lambda _: nn.Linear(2, 2)), "a model of kind causal is a CausalModel"),
    "of another kind": (replace(PAIR, build=ARCHITECTURE.build, tiny={**ARCHITECTURE.tiny, "model_type": "pair"}),
                        "gives a Toy, and a model of kind seq2seq is a Seq2SeqModel"),
    "takes memory": (toy(change=on_cpu), "puts norm.weight on the device cpu: it must allocate nothing"),
    "a table": (toy(change=with_table), "the buffer table is not in a checkpoint"),
    "a tensor": (toy(change=with_attribute), "layers.1 keeps a tensor, angles"),
    "two names": (toy(change=silently_tied), "lm_head.weight are one parameter under two names"),
    "a tie to nothing": (toy(ties=lambda _: {"head.weight": "embed_tokens.weight"}), "no such parameter"),
    "a chain of ties": (toy(ties=lambda _: CHAIN), "which itself shares another's storage"),
    "an unlike tie": (toy(ties=lambda _: {"lm_head.weight": "norm.weight"}), r"of the shapes \(259, 32\) and \(32,\)"),
    "no such block": (toy(blocks=("layers.*", "blocks.*")), r"'blocks\.\*' of blocks matches nothing"),
    "one block of all": (toy(blocks=("layers",)), "are layers.0, layers.1 in the model and layers by the patterns"),
    "a block left out": (toy(OneBlock), "are layers.0 in the model and layers.0, layers.1 by the patterns"),
    "quantises nothing": (toy(quantize=("layers.*.up.weight",)), "'layers.*.up.weight' of quantize matches nothing"),
    "quantises a norm": (toy(quantize=("layers.*.*.weight",)), "norm.weight, which is no weight of an nn.Linear"),
    "quantises a head": (toy(quantize=("layers.*.*_proj.weight", "lm_head.weight")), "which lies in no block"),
    "keeps nothing": (toy(keep_16bit=("lm_head", "score")), "'score' of keep_16bit matches nothing"),
    "keeps in silence": (toy(quantize=("layers.*.q_proj.weight",)), "k_proj is neither in quantize nor in keep_16bit"),
    "adapts nothing": (toy(adapt=("layers.*.*_proj", "layers.*.up")), "of adapt matches nothing"),
    "adapts a norm": (toy(adapt=("layers.*.norm",)), "layers.0.norm, a RMSNorm: adapters go on linear layers"),
    "adapts a head": (toy(adapt=("lm_head",)), "lm_head, which lies in no block: training"),
    "takes any config": (replace(ARCHITECTURE, build=Careless.of), "config's num_hidden_layers, build raises KeyError"),
    "no parameter": (toy(Numbered, change=numbered), "something of the model is no parameter"),
    "reads a weight": (toy(ReadsWeight), r"to be checked was 'store' .* AttributeError"),
    "other in 4 bits": (blocks_that(when_packed_in_bits), "4-bit model gives other logits"),
    "wider": (toy(Wide), "loaded in bfloat16 its logits are float32"),
    "sees what comes": (blocks_that(lambda b, x, t: usual(b, x, t) + x.mean(1, keepdim=True)), "with a later token"),
    "sees others": (blocks_that(lambda b, x, t: usual(b, x, t) + x.mean(0, keepdim=True)), "the other rows"),
    "reads nothing": (toy(Blind), "the model does not read its ids"),
    "more than blocks": (toy(MoreThanBlocks), "its loss by blocks that are kept is not that of the whole model"),
    "never the same": (blocks_that(count), "its loss by blocks|the gradient of"),
    "past the state": (blocks_that(remember), "to be checked was 'training' .* RuntimeError"),
    "cut at its input": (blocks_that(cut, layer=1), "by blocks that are kept the gradient of layers.0"),
    "not called": (toy(change=with_unused_linear), "more_proj.lora_a gets no gradient"),
    "detached": (blocks_that(lambda b, x, t: x + (usual(b, x, t) - x).detach(), layer=1), "layers.1.*gets no gradient"),
    "packing forgotten": (toy(ForgetsPacking), "a sample behind 4 tokens of others gives other hidden states"),
    "positions forgotten": (toy(ForgetsPositions), "with a cache its logits are others than without"),
    "layers confused": (toy(change=one_layer_for_all), "with a cache its logits are others than without"),
    "no context": (toy(Boundless), "its context is 0"),
    "written otherwise": (blocks_that(when_frozen), "written and read again gives other logits"),
    "other when merged": (blocks_that(when_adapted), "merged with an adapter it gives other logits"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name: str) -> None:
    architecture, sentence = BROKEN[name]
    with pytest.raises(BrokenPromise, match=sentence) as raised:
        check_architecture(architecture)
    assert str(raised.value).startswith(f"{architecture.name}: ")
    assert "\n" not in str(raised.value).partition("Error: ")[0]


def test_the_toy_keeps_every_promise() -> None:
    assert not check_architecture(ARCHITECTURE).left_out


@pytest.mark.parametrize("family", sorted(architectures(load_plugins())))
def test_the_built_in_families_keep_every_promise(family: str) -> None:
    architecture = architectures(load_plugins())[family]
    found = check_architecture(architecture)
    assert found.left_out.keys() == (set() if architecture.packs else {"packing"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_config_of_ones_own_is_checked_in_place_of_the_tiny_one(tied: bool) -> None:
    llama = architectures(load_plugins())["llama"]
    config = {**llama.tiny, "attention_bias": True, "mlp_bias": True, "head_dim": 6, "tie_word_embeddings": tied}
    assert not check_architecture(llama, config=config).left_out
    with pytest.raises(BrokenPromise, match="num_key_value_heads"):
        check_architecture(llama, config={**config, "num_key_value_heads": 3})


def test_what_a_family_does_not_promise_is_left_out_and_named() -> None:
    class Plain(Toy):
        def new_cache(self, batch: int, capacity: int) -> Any:
            raise NotImplementedError("Plain has no cache")

    found = check_architecture(toy(Plain, packs=False))
    assert found.left_out == {
        "packing": "it does not say that it packs",
        "generation": "Plain has no cache, so it does not generate",
    }
    assert "packing" not in found.kept
    assert "merge" in found.kept


def plain_toy(folder: Path) -> Callable[[Inputs], Tensor]:
    """The toy's logits once more, in nothing but torch."""
    weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}
    heads = ARCHITECTURE.tiny["num_attention_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def logits(inputs: Inputs) -> Tensor:
        x = weights["embed_tokens.weight"][inputs.ids]
        size, count = x.shape[-1] // heads, x.shape[1]
        angles = torch.arange(count)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
        turn = torch.polar(torch.ones_like(angles), angles)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        for layer in range(2):
            normed = norm(x, f"layers.{layer}.norm")
            q, k, v = (
                (normed @ weights[f"layers.{layer}.{name}_proj.weight"].T).unflatten(-1, (heads, size)).transpose(1, 2)
                for name in "qkv"
            )
            q, k = (torch.view_as_real(torch.complex(*part.chunk(2, -1)) * turn).mT.flatten(-2) for part in (q, k))
            shares = (q @ k.mT / size**0.5).masked_fill(later, -torch.inf).softmax(-1)
            x = x + (shares @ v).transpose(1, 2).flatten(2) @ weights[f"layers.{layer}.o_proj.weight"].T
        return norm(x, "norm") @ weights["lm_head.weight"].T

    return logits


def test_logits_are_compared_with_a_reference() -> None:
    assert "reference" in check_architecture(ARCHITECTURE, reference=plain_toy).kept

    def other(folder: Path) -> Callable[[Inputs], Tensor]:
        return lambda inputs: plain_toy(folder)(inputs) * 1.0001

    with pytest.raises(BrokenPromise, match="its logits are not the reference's"):
        check_architecture(ARCHITECTURE, reference=other)


def test_an_encoder_decoder_keeps_every_promise_but_that_of_packing() -> None:
    assert check_architecture(PAIR).left_out.keys() == {"packing"}


class SeesPadding(Pair):
    def begin(self, inputs: Inputs) -> Any:
        state, lengths = super().begin(inputs)
        return state, torch.full_like(lengths, state[0].shape[1])


class NeverReorders(Pair):
    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> PairCache:
        cache = super().new_cache(memory, source_lengths, capacity=capacity)
        cache.reorder = lambda _: None  # type: ignore[method-assign]
        return cache


@pytest.mark.parametrize(
    ("model", "sentence"),
    [(SeesPadding, "with the padding of the source"), (NeverReorders, "a reordered cache give each row")],
)
def test_an_encoder_decoder_that_breaks_a_promise_is_named(model: type[Pair], sentence: str) -> None:
    with pytest.raises(BrokenPromise, match=sentence):
        check_architecture(replace(PAIR, build=model))


def test_checking_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    check_architecture(ARCHITECTURE)
    assert torch.equal(torch.get_rng_state(), before)
