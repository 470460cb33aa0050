"""`inspect`: what it says of each kind of folder, as JSON and for the eye."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qlora_kernels import dequantize_reference, quantize
from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 1}
DOWN = "model.layers.0.mlp.down_proj"


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert execute(["inspect", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found: dict[str, Any] = json.loads(said.out)
    return found


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["tensors"]}


def digest_of(folder: Path) -> str:
    return str(json.loads((folder / "qlora_pipe.json").read_text())["digest"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **SIZES)


@pytest.fixture
def store(tmp_path: Path, source: Path) -> Path:
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    return tmp_path / "store"


def test_a_checkpoint_is_described_by_its_tensors(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, weights = inspected(source, capsys), load_file(source / "model.safetensors")
    rows = rows_of(found)
    assert rows == {
        name: {"name": name, "shape": list(weight.shape), "type": "bfloat16", "bits": 16.0}
        for name, weight in weights.items()
    }
    del found["tensors"]
    assert found == {
        "kind": "checkpoint",
        "model_type": "llama",
        "repo": None,
        "revision": None,
        "shards": 1,
        "bytes": (source / "model.safetensors").stat().st_size,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "bits_per_weight": 16.0,
    }


def test_a_store_is_described_by_its_sizes_errors_settings_and_source(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, weights = inspected(store, capsys), load_file(source / "model.safetensors")
    rows = rows_of(found)
    assert {name: tuple(row["shape"]) for name, row in rows.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    packed = {name: row for name, row in rows.items() if "_proj" in name}
    assert len(packed) == 7
    assert all(row["type"] == "nf4" for row in packed.values())
    # 4 + 8/64 + 32/(64 * 256), exact where every nested block is full: 256 x 256 weights.
    assert rows["model.layers.0.self_attn.q_proj.weight"]["bits"] == 4.127
    assert all(4.1269 <= row["bits"] <= 4.1275 for row in packed.values())
    for name, row in packed.items():
        exact = weights[name].double()
        error = (dequantize_reference(quantize(weights[name]), torch.float32).double() - exact).norm() / exact.norm()
        assert row["relative_error"] == pytest.approx(float(error), rel=1e-3)
        assert 0.08 < row["relative_error"] < 0.1
    kept = {name: row for name, row in rows.items() if name not in packed}
    assert all(row.keys() == {"name", "shape", "type", "bits"} for row in kept.values())
    assert {(row["type"], row["bits"]) for row in kept.values()} == {("bfloat16", 16.0)}

    counts = {name: weight.numel() for name, weight in weights.items()}
    assert found["parameters"] == sum(counts.values())
    mean = sum(counts[name] * row["bits"] for name, row in rows.items()) / sum(counts.values())
    assert found["bits_per_weight"] == pytest.approx(mean, abs=1e-4)
    assert (found["kind"], found["model_type"], found["shards"]) == ("store", "llama", 1)
    assert found["bytes"] == (store / "model.safetensors").stat().st_size
    assert found["digest"] == digest_of(store)
    assert found["inputs"]["settings"] == {"type": "nf4", "block_size": 64, "double_quant": True, "shard_mib": 4096}
    assert found["inputs"]["source"]["sha256"] == {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }


def test_a_stores_errors_are_summed_up_by_block_and_over_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=11)
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    found = inspected(tmp_path / "store", capsys)
    rows = rows_of(found)
    assert [block["name"] for block in found["blocks"]] == [f"model.layers.{number}" for number in range(11)]
    for block in [*found["blocks"], {**found, "name": "model", "tensors": len(rows)}]:
        inside = [row for name, row in rows.items() if name.startswith(f"{block['name']}.") or block["name"] == "model"]
        counts = {row["name"]: torch.Size(row["shape"]).numel() for row in inside}
        assert (block["tensors"], block["parameters"]) == (len(inside), sum(counts.values()))
        bits = sum(counts[row["name"]] * row["bits"] for row in inside) / sum(counts.values())
        assert block["bits_per_weight"] == pytest.approx(bits, abs=1e-4)
        errors = {row["name"]: row["relative_error"] for row in inside if "relative_error" in row}
        squares = sum(counts[name] * error**2 for name, error in errors.items())
        assert block["relative_error"] == pytest.approx(
            (squares / sum(counts[name] for name in errors)) ** 0.5, rel=1e-3
        )
        assert block["largest_error"] == max(errors.values()) == errors[block["largest_error_of"]]


def test_the_manifests_files_and_further_fields_are_told(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, manifest = inspected(store, capsys), json.loads((store / "qlora_pipe.json").read_text())
    assert found["fields"] == {"totals": manifest["totals"]}
    assert found["files"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in store.iterdir()
        if path.name != "qlora_pipe.json"
    }


def test_a_peers_store_is_described_by_its_config_and_headers(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(shared_data / "interop" / "stories260K-bnb-nf4-dq-bf16", capsys)
    assert found["quantization"] == {
        "compute_dtype": "bfloat16",
        "quant_storage": "uint8",
        "quant_type": "nf4",
        "use_double_quant": True,
    }
    assert [(block["name"], block["tensors"]) for block in found["blocks"]] == [
        (f"model.layers.{number}", 9) for number in range(5)
    ]
    assert sum(row["type"] == "nf4" for row in found["tensors"]) == 35
    assert not {"inputs", "files", "relative_error"} & found.keys()


@pytest.mark.parametrize(
    ("flags", "kind", "bits"),
    [
        (["--type", "fp4"], "fp4", 4.127),
        (["--no-double-quant"], "nf4", 4.5),
        (["--block-size", "4096", "--no-double-quant"], "nf4", 4 + 32 / 4096),
        (["--block-size", "32"], "nf4", 4 + 8 / 32 + 32 / (32 * 256)),
    ],
)
def test_bits_per_weight_follow_from_the_settings(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, flags: list[str], kind: str, bits: float
) -> None:
    assert execute(["quantize", str(source), str(tmp_path / "out"), *flags]) == 0
    row = rows_of(inspected(tmp_path / "out", capsys))["model.layers.0.self_attn.q_proj.weight"]
    assert (row["type"], row["bits"]) == (kind, round(bits, 4))


def test_a_store_without_a_manifest_is_described_by_its_headers(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_manifest = inspected(store, capsys)
    (store / "qlora_pipe.json").unlink()
    found = inspected(store, capsys)
    assert with_manifest.keys() - found.keys() == {
        *("inputs", "fields", "files", "digest"),
        *("relative_error", "largest_error", "largest_error_of"),
    }
    assert found["quantization"] == with_manifest["quantization"]
    assert [block["name"] for block in found["blocks"]] == ["model.layers.0"]
    assert found["bits_per_weight"] == with_manifest["bits_per_weight"]
    assert not any("relative_error" in row for row in found["tensors"])


def test_a_run_and_its_adapter_and_what_is_merged_of_it_are_described(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    (tmp_path / "text.txt").write_text("a few words to train on, and then a few more of them\n" * 20)
    words = f"finetune {store} --data text:{tmp_path / 'text.txt'} --out {run} --steps 3 --save-every 2 --rank 5"
    assert execute([*words.split(), "--batch-size", "2", "--max-tokens", "32", "--alpha", "7"]) == 0

    found = inspected(run, capsys)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found == {
        "kind": "run",
        "finished": True,
        "settings": yaml.safe_load((run / "config.resolved.yaml").read_text()),
        "checkpoints": ["step-2", "step-3"],
        "steps": 3,
        "last": metrics[-1],
    }
    assert (found["settings"]["rank"], found["settings"]["base"]) == (5, str(store))

    found = inspected(run / "final", capsys)
    rows = rows_of(found)
    assert len(rows) == found["layers"] == 7
    assert rows[DOWN] == {"name": DOWN, "in": 520, "out": 256, "rank": 5}
    assert found["parameters"] == sum(5 * (row["in"] + row["out"]) for row in rows.values())
    described = {key: found[key] for key in ("kind", "rank", "alpha", "dropout", "rslora", "task_type", "base")}
    assert described == {
        "kind": "adapter",
        "rank": 5,
        "alpha": 7.0,
        "dropout": 0.1,
        "rslora": False,
        "task_type": "CAUSAL_LM",
        "base": None,
    }
    assert found["digest"] == digest_of(run / "final")
    assert found["inputs"]["base"]["manifest"] == digest_of(store)
    assert found["inputs"]["settings"]["rank"] == 5

    assert execute(["merge", str(store), str(run), str(merged)]) == 0
    found = inspected(merged, capsys)
    assert (found["kind"], found["bits_per_weight"], found["digest"]) == ("checkpoint", 16.0, digest_of(merged))
    assert found["inputs"]["base"]["manifest"] == digest_of(store)
    assert found["inputs"]["settings"] == {"dtype": "bfloat16", "shard_mib": 4096}


def test_a_run_that_has_just_begun_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.resolved.yaml").write_text("base: somewhere\nsteps: 5\n")
    assert inspected(tmp_path / "run", capsys) == {
        "kind": "run",
        "finished": False,
        "settings": {"base": "somewhere", "steps": 5},
        "checkpoints": [],
        "steps": 0,
        "last": {},
    }


def test_without_json_each_fact_each_block_and_each_tensor_is_a_line(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (source, store):
        found = inspected(folder, capsys)
        assert execute(["inspect", str(folder)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["kind", found["kind"]] in lines
        assert ["parameters", str(found["parameters"])] in lines
        assert {line[0] for line in lines if line and line[0].startswith("model.layers")} == {
            *(name for name in rows_of(found) if name.startswith("model.layers")),
            *(block["name"] for block in found.get("blocks", [])),
        }


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("nothing is there", 66, "there is no folder"),
        ("a file is cut off", 65, "model.safetensors"),
        ("the config is gone", 65, "config.json"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, change: str, code: int, says: str
) -> None:
    folder = tmp_path / "nowhere" if change == "nothing is there" else source
    if change == "a file is cut off":
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    if change == "the config is gone":
        (source / "config.json").unlink()
    assert execute(["inspect", str(folder), "--json"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("error: ")
    assert says in sentence


def test_a_run_with_a_damaged_line_of_metrics_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.resolved.yaml").write_text("base: store\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss"\n')
    assert execute(["inspect", str(tmp_path)]) == 65
    assert f"the last line of {tmp_path / 'metrics.jsonl'} is not valid JSON" in capsys.readouterr().err
