"""Steps of one token that are all the same work: the tokens of the plain way, and what is kept from text to text.

What is captured on a GPU is run as it is here: everything but the capture itself is tested on any machine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from qlora_kernels import quantize
from qlora_pipe.errors import NonFiniteError
from qlora_pipe.generate import CapturedSteps, EagerSteps, Steps, generate, steps_of
from qlora_pipe.nn.cache import StepCache
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.nn.linear import QuantizedLinear, linear_modules, replace_module
from qlora_pipe.testing import filled, tiny_weights
from qlora_plugins.llama import register_architectures

PROMPT = [1, 17, 4, 60]
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
KINDS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
]


def tiny_llama(*, dtype: torch.dtype = torch.float64, **overrides: Any) -> DecoderModel:
    config = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 71,
        "max_position_embeddings": 128,
        **overrides,
    }
    model = filled(register_architectures()[0], config, tiny_weights(config, seed=5), dtype=dtype)
    assert isinstance(model, DecoderModel)
    return model


def four_bit_llama_on_a_gpu(dtype: torch.dtype) -> DecoderModel:
    model = tiny_llama(dtype=dtype, hidden_size=64, intermediate_size=96).to("cuda")
    for path, layer in linear_modules(model).items():
        if path != "lm_head":
            replace_module(model, path, QuantizedLinear(quantize(layer.weight.detach())))
    return model


class Recorded:
    """A capture that runs the step as a warm-up, undoes it, and replays by running it again."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, step: Callable[[], None], *, undo: Callable[[], None]) -> Callable[[], None]:
        self.times += 1
        step()
        undo()
        return step


def greedy(model: DecoderModel, steps: Steps, *, prompt: Sequence[int] = PROMPT, count: int = 25) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=count, stop_ids=(), steps=steps))


@pytest.mark.parametrize("overrides", KINDS)
def test_equal_steps_give_the_tokens_of_the_plain_way(overrides: dict[str, Any]) -> None:
    model = tiny_llama(**overrides)
    expected = greedy(model, EagerSteps(model))
    assert len(set(expected)) > 8, "a model that repeats itself shows little"
    assert greedy(model, CapturedSteps(model, capture=Recorded())) == expected


@pytest.mark.parametrize("overrides", KINDS)
def test_a_step_gives_the_logits_of_the_plain_way(overrides: dict[str, Any]) -> None:
    model = tiny_llama(**overrides)
    ids = torch.randint(71, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = model.new_cache(2, 20)
    with torch.inference_mode():
        model(ids[:, :11], cache=plain)
        steps = StepCache(plain, capacity=30)
        # What lies behind the filled positions is never looked at.
        steps.stored[..., 11:, :] = math.nan
        for position in range(11, 20):
            token = ids[:, position : position + 1]
            torch.testing.assert_close(model(token, cache=steps), model(token, cache=plain), rtol=0, atol=1e-12)
    assert steps.position.item() == plain.length == 20


@pytest.mark.parametrize("overrides", KINDS)
def test_the_table_of_steps_holds_the_bits_of_each_positions_own(overrides: dict[str, Any]) -> None:
    rotary, like = tiny_llama(**overrides).config.rotary, torch.empty(0)
    table = rotary.step_tables(40, like=like)
    for position in range(40):
        own = torch.stack(rotary.tables(torch.tensor([position]), length=position + 1, like=like), dim=1)
        assert torch.equal(table[position : position + 1], own)


def test_a_text_outgrows_the_first_cache_and_the_step_is_captured_again() -> None:
    model, recorded = tiny_llama(), Recorded()
    expected = greedy(model, EagerSteps(model), count=100)
    assert greedy(model, CapturedSteps(model, ahead=8, capture=recorded), count=100) == expected
    # Room for 16, 32, 64 and 128.
    assert recorded.times == 4


def test_the_next_text_finds_the_step_captured_and_nothing_of_the_last_one() -> None:
    model, recorded = tiny_llama(), Recorded()
    steps = CapturedSteps(model, ahead=32, capture=recorded)
    other = [9, 2, 33]
    for prompt in (PROMPT, other, PROMPT):
        assert greedy(model, steps, prompt=prompt) == greedy(model, EagerSteps(model), prompt=prompt)
    assert recorded.times == 1
    # One longer than all before it needs more room, and is captured anew.
    long = list(range(50))
    assert greedy(model, steps, prompt=long) == greedy(model, EagerSteps(model), prompt=long)
    assert recorded.times == 2


def test_a_text_that_was_left_early_does_not_disturb_the_next() -> None:
    model = tiny_llama()
    steps = CapturedSteps(model, capture=Recorded())
    expected = greedy(model, EagerSteps(model))
    begun = generate(model, PROMPT, max_new_tokens=20, stop_ids=(), steps=steps)
    assert [next(begun) for _ in range(5)] == expected[:5]
    assert greedy(model, steps) == expected
    assert (
        list(generate(model, PROMPT, max_new_tokens=25, stop_ids={expected[6]}, steps=steps))
        == expected[: expected.index(expected[6])]
    )


def test_a_seed_draws_the_same_tokens_either_way() -> None:
    model = tiny_llama()
    steps = CapturedSteps(model, ahead=8, capture=Recorded())

    def drawn(way: Steps, seed: int) -> list[int]:
        settings: dict[str, Any] = {"stop_ids": (), "temperature": 0.8, "top_p": 0.9, "seed": seed}
        return list(generate(model, PROMPT, max_new_tokens=40, steps=way, **settings))

    for seed in (1, 2):
        assert drawn(steps, seed) == drawn(EagerSteps(model), seed)
    assert drawn(steps, 1) != drawn(steps, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_breaks_midway_is_an_error_at_its_token(temperature: float) -> None:
    model = tiny_llama()
    steps = CapturedSteps(model, capture=Recorded())
    tokens = generate(model, PROMPT, max_new_tokens=9, stop_ids=(), steps=steps, temperature=temperature)
    for _ in range(3):
        next(tokens)
    model.lm_head.weight.data[3, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"at position [78]:"):
        list(tokens)


def test_generation_ends_with_the_context_however_large_the_cache() -> None:
    model = tiny_llama(max_position_embeddings=20)
    assert len(greedy(model, CapturedSteps(model, ahead=16, capture=Recorded()), count=500)) == 16


def test_a_step_of_two_tokens_is_refused() -> None:
    model = tiny_llama()
    cache = StepCache(model.new_cache(1, 4), capacity=4)
    with pytest.raises(ValueError, match="a step is one token; 2 were given"):
        model(torch.tensor([[1, 2]]), cache=cache)


def test_a_cache_on_a_cpu_is_stepped_through_plainly() -> None:
    assert isinstance(steps_of(tiny_llama()), EagerSteps)


class TestOnAGpu:
    """Replayed steps against the same steps run one by one, and what a token costs the allocator."""

    pytestmark = ON_A_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_replayed_steps_give_the_tokens_and_logits_of_steps_run_one_by_one(self, dtype: torch.dtype) -> None:
        model = four_bit_llama_on_a_gpu(dtype)
        replayed, run = CapturedSteps(model, ahead=16), CapturedSteps(model, ahead=16, capture=Recorded())
        expected = greedy(model, run, count=100)
        assert greedy(model, replayed, count=100) == expected
        assert torch.equal(replayed.logits, run.logits)
        assert greedy(model, replayed, prompt=[9, 2, 33]) == greedy(model, run, prompt=[9, 2, 33])

    def test_float32_gives_the_tokens_of_the_plain_way(self) -> None:
        model = four_bit_llama_on_a_gpu(torch.float32)
        assert isinstance(steps_of(model), CapturedSteps)
        assert greedy(model, CapturedSteps(model)) == greedy(model, EagerSteps(model))

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_a_token_costs_no_allocation(self, temperature: float) -> None:
        model = four_bit_llama_on_a_gpu(torch.float16)
        tokens = generate(model, PROMPT, max_new_tokens=60, stop_ids=(), temperature=temperature, top_p=0.9)
        for _ in range(5):
            next(tokens)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        for _ in range(40):
            next(tokens)
        after = torch.cuda.memory_stats()
        assert after["num_device_alloc"] == before["num_device_alloc"]
        assert after["allocated_bytes.all.current"] == before["allocated_bytes.all.current"]
        if temperature == 0:
            # Not even from what the allocator holds.
            assert after["allocation.all.allocated"] == before["allocation.all.allocated"]

    def test_a_seed_draws_the_same_tokens_replayed(self) -> None:
        model = four_bit_llama_on_a_gpu(torch.float32)
        found = [
            list(generate(model, PROMPT, max_new_tokens=40, stop_ids=(), temperature=0.8, seed=3, steps=steps))
            for steps in (CapturedSteps(model), EagerSteps(model), CapturedSteps(model, ahead=8))
        ]
        assert found[0] == found[1] == found[2]

    def test_broken_weights_are_an_error(self) -> None:
        model = four_bit_llama_on_a_gpu(torch.float16)
        tokens = generate(model, PROMPT, max_new_tokens=9, stop_ids=())
        for _ in range(3):
            next(tokens)
        model.lm_head.weight.data[3, 3] = math.nan
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            list(tokens)
