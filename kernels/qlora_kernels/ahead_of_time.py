"""Compile every kernel for GPUs that need not be there: `python -m qlora_kernels.ahead_of_time` prints what came out.

Not possible in a process with TRITON_INTERPRET=1, where kernels are plain Python.
"""

import importlib
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

from qlora_kernels.variant import Variant

# The modules that hold kernels; `variants()` of each names the forms it launches.
MODULES: Final = (
    "dequantize_triton",
    "norm_triton",
    "rotary_triton",
    "gated_triton",
    "frozen_head_triton",
    "quantized_matmul_triton",
    "decode_attention_triton",
)
# Compute capabilities: A100, and H100 or H200.
CAPABILITIES: Final = (80, 90)
_WARP: Final = 32


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
    for module in MODULES:
        yield from importlib.import_module(f"qlora_kernels.{module}").variants()


def compile_variant(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel, whose `asm` holds "ptx" and "cubin"; no GPU is needed."""
    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    # What a launch finds out by itself: these pointers and sizes are multiples of 16.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in variant.aligned
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
