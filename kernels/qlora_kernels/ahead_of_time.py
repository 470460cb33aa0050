"""Compile every kernel for GPUs that need not be there: `python -m qlora_kernels.ahead_of_time` prints what came out.

Not possible in a process with TRITON_INTERPRET=1, where kernels are plain Python.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_kernels.dequantize_triton import OPTIONS, blocks_per_program, dequantize_kernel

# Compute capabilities: A100, and H100 or H200.
CAPABILITIES: Final = (80, 90)
_WARP: Final = 32


class Variant(NamedTuple):
    """One specialisation of a kernel, named by what it is specialised for."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


class Usage(NamedTuple):
    """What one compiled kernel takes, per thread and (shared memory) per program."""

    kernel: str
    capability: int
    cubin_bytes: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def variants() -> Iterator[Variant]:
    """Every kernel in the forms that are launched."""
    for out in ("fp32", "fp16", "bf16"):
        for nested in (True, False):
            for block_size in (64,) if out != "bf16" else (32, 64, 4096):
                yield _dequantize(out, nested=nested, block_size=block_size)


def _dequantize(out: str, *, nested: bool, block_size: int) -> Variant:
    signature = {
        "codes_B": "*u8",
        "absmax_S": "*u8" if nested else "*fp32",
        "levels_16": "*fp32",
        "nested_absmax_G": "*fp32",
        "nested_levels_256": "*fp32",
        "offset_1": "*fp32",
        "out_N": "*i16" if out == "bf16" else f"*{out}",
        "n_weights": "i32",
        "n_bytes": "i32",
        "n_blocks": "i32",
        "nested_block_size": "i32",
    }
    constants = {
        "BLOCK_SIZE": block_size,
        "BLOCKS_PER_PROGRAM": blocks_per_program(block_size),
        "NESTED": nested,
        "OUT_IS_BFLOAT16": out == "bf16",
    }
    name = f"dequantize_{out}_{'double_quant' if nested else 'plain'}_block{block_size}"
    return Variant(name, dequantize_kernel, signature, constants, OPTIONS)


def compile_variant(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel, whose `asm` holds "ptx" and "cubin"; no GPU is needed."""
    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    # What a launch finds out by itself: these pointers and sizes are multiples of 16.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("n_weights", "n_bytes", "nested_block_size")
    }
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, _WARP), options=variant.options)


def usage(variant: Variant, capability: int) -> Usage:
    """Compile one variant and read what it takes with the cuobjdump that Triton brings along."""
    cubin = compile_variant(variant, capability).asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing))
    registers, stack, local, shared = (int(found[key]) for key in ("REG", "STACK", "LOCAL", "SHARED"))
    return Usage(variant.name, capability, len(cubin), registers, stack, local, shared)


def main() -> None:
    """Print one JSON object per kernel and target."""
    for variant in variants():
        for capability in CAPABILITIES:
            print(json.dumps(usage(variant, capability)._asdict()))  # noqa: T201


if __name__ == "__main__":
    main()
