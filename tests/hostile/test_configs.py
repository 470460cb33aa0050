"""Absurd configs through the command line: each is refused by its file and field, with the code of a bad config."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.damage import Damage, edit, refusal, settings

GENERATE = ("--prompt", "x", "--max-new-tokens", "1")


CONFIGS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no heads": ({"num_attention_heads": 0}, 78, '"num_attention_heads" is 0; it must be a whole number from 1 to'),
    "negative heads": ({"num_attention_heads": -4}, 78, '"num_attention_heads" is -4; it must be a whole number'),
    "heads as text": ({"num_attention_heads": "4"}, 78, "\"num_attention_heads\" is '4'; it must be a whole number"),
    "heads as a float": ({"num_attention_heads": 4.0}, 78, '"num_attention_heads" is 4.0; it must be a whole number'),
    "heads true": ({"num_attention_heads": True}, 78, '"num_attention_heads" is True; it must be a whole number'),
    "heads null": ({"num_attention_heads": None}, 78, '"num_attention_heads" is missing; it must be a whole number'),
    "heads a list": ({"num_attention_heads": [4]}, 78, '"num_attention_heads" is [4]; it must be a whole number'),
    "no key heads": ({"num_key_value_heads": 0}, 78, '"num_key_value_heads" is 0; it must be a whole number from 1 to'),
    "key heads that do not divide": (
        {"num_key_value_heads": 3},
        78,
        '"num_key_value_heads" is 3; it must be a divisor of num_attention_heads, which is 4',
    ),
    "more key heads than heads": ({"num_key_value_heads": 8}, 78, '"num_key_value_heads" is 8; it must be a whole'),
    "heads that do not divide": (
        {"hidden_size": 33},
        78,
        '"hidden_size" is 33; it must be a multiple of num_attention',
    ),
    "negative size": ({"hidden_size": -32}, 78, '"hidden_size" is -32; it must be a whole number from 1 to'),
    "enormous size": ({"hidden_size": 10**30}, 78, '"hidden_size" is 1000000000000000000000000000000; it must be'),
    "odd heads": ({"head_dim": 7}, 78, '"head_dim" is 7; it must be even'),
    "no layers": ({"num_hidden_layers": 0}, 78, '"num_hidden_layers" is 0; it must be a whole number from 1 to 4096'),
    "10**9 layers": ({"num_hidden_layers": 10**9}, 78, '"num_hidden_layers" is 1000000000; it must be a whole number'),
    "layers true": ({"num_hidden_layers": True}, 78, '"num_hidden_layers" is True; it must be a whole number'),
    "more layers than weights": ({"num_hidden_layers": 3}, 65, "lacks the tensor model.layers.2."),
    "fewer layers than weights": ({"num_hidden_layers": 1}, 65, "holds the tensor model.layers.1."),
    "another vocabulary": ({"vocab_size": 260}, 65, "has shape [259, 32], and its config asks for [260, 32]"),
    "no vocabulary": ({"vocab_size": 0}, 78, '"vocab_size" is 0; it must be a whole number from 1 to'),
    "an enormous vocabulary": ({"vocab_size": 2**40}, 78, '"vocab_size" is 1099511627776; it must be a whole number'),
    "another width": ({"intermediate_size": 73}, 65, "and its config asks for ["),
    "no width": ({"intermediate_size": 0}, 78, '"intermediate_size" is 0; it must be a whole number from 1 to'),
    "theta 0": ({"rope_theta": 0}, 78, '"rope_theta" is 0; it must be a finite number above 1'),
    "theta text": ({"rope_theta": "1e4"}, 78, "\"rope_theta\" is '1e4'; it must be a finite number above 1"),
    "theta true": ({"rope_theta": True}, 78, '"rope_theta" is True; it must be a finite number above 1'),
    "theta enormous": ({"rope_theta": 1e300}, 78, '"rope_theta" is 1e+300; it must be a finite number above 1 and at'),
    "rope NaN": ({"rope_scaling": {"factor": float("nan")}}, 65, "config.json is not valid JSON: NaN is not a JSON"),
    "rope a number": ({"rope_scaling": 5}, 78, '"rope_scaling" is 5; it must be an object'),
    "rope of an unknown kind": ({"rope_scaling": {"type": "x"}}, 78, "\"rope_scaling.type\" is 'x'; it must be one of"),
    "rope without a factor": ({"rope_scaling": {"type": "linear"}}, 78, '"rope_scaling.factor" is missing; it must be'),
    "rope of a negative factor": (
        {"rope_scaling": {"type": "linear", "factor": -1}},
        78,
        '"rope_scaling.factor" is -1; it must be a finite number at least 1',
    ),
    "rope of several kinds": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        78,
        "\"rope_parameters.full_attention\" is {'rope_theta': 1000000.0}; it must be a single value",
    ),
    "epsilon 0": ({"rms_norm_eps": 0}, 78, '"rms_norm_eps" is 0; it must be a finite number above 0 and at most 1'),
    "epsilon text": ({"rms_norm_eps": "1e-5"}, 78, "\"rms_norm_eps\" is '1e-5'; it must be a finite number above 0"),
    "no positions": ({"max_position_embeddings": 0}, 78, '"max_position_embeddings" is 0; it must be a whole number'),
    "positions without end": ({"max_position_embeddings": 2**40}, 78, '"max_position_embeddings" is 1099511627776; it'),
    "an unknown activation": ({"hidden_act": "swish9"}, 78, "\"hidden_act\" is 'swish9'; it must be one of silu"),
    "an activation that is none": ({"hidden_act": 5}, 78, '"hidden_act" is 5; it must be one of silu'),
    "biases as text": ({"attention_bias": "false"}, 78, "\"attention_bias\" is 'false'; it must be true or false"),
    "biases 0": ({"mlp_bias": 0}, 78, '"mlp_bias" is 0; it must be true or false'),
    "ties as text": ({"tie_word_embeddings": "no"}, 78, "\"tie_word_embeddings\" is 'no'; it must be true or false"),
    "a window": ({"sliding_window": 4096}, 78, '"sliding_window" is 4096; it must be absent'),
    "no type": ({"model_type": None}, 78, "no installed plugin reads model_type None"),
    "a type of many": ({"model_type": ["llama"]}, 78, "no installed plugin reads model_type ['llama']"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("kind", ["checkpoint", "store"])
def test_an_absurd_config_is_refused_by_its_file_and_field(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, kind: str, case: str
) -> None:
    fields, code, sentence = CONFIGS[case]
    folder = shutil.copytree(made / kind, tmp_path / "model")
    (folder / "qlora_pipe.json").unlink(missing_ok=True)
    settings(**fields)(folder)
    found = refusal(capsys, "generate", folder, *GENERATE)
    assert found[0] == code
    assert sentence in found[1]
    if code == 78 and "model_type" not in fields:
        assert found[1].startswith("config.json: ")


def end(value: object, file: str = "generation_config.json") -> Damage:
    def damage(path: Path) -> None:
        edit("generation_config.json", lambda config: config.pop("eos_token_id"))(path)
        edit(file, lambda config: config.update(eos_token_id=value))(path)

    return damage


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", True, -1, 2.0, [True], [2, "x"], {}, [[2]]], ids=repr)
def test_an_id_that_is_none_does_not_silently_end_no_text(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, value: object, file: str
) -> None:
    folder = shutil.copytree(made / "checkpoint", tmp_path / "model")
    end(value, file)(folder)
    code, sentence = refusal(capsys, "generate", folder, *GENERATE)
    assert code == 78
    assert sentence == f'{file}: "eos_token_id" is {value!r}; it must be a token\'s id or a list of ids.'
