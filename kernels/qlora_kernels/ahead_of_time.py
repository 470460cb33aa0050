"""Compile every kernel for GPUs that need not be there: `python -m qlora_kernels.ahead_of_time` prints what came out.

Not possible in a process with TRITON_INTERPRET=1, where kernels are plain Python.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_kernels.variant import Variant

# The modules that hold kernels, each with `variants()`, the forms it launches: all that are named so.
MODULES: Final = tuple(
    sorted(found.name for found in iter_modules([str(Path(__file__).parent)]) if found.name.endswith("_triton"))
)
# Turing (T4), Ampere (A100; RTX 30), Ada (L4, RTX 40), Hopper, Blackwell (B200; RTX 50), and AMD's MI300.
TARGETS: Final = {
    f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 90, 100, 120)
} | {"gfx942": GPUTarget("hip", "gfx942", 64)}


class Usage(NamedTuple):
    """What one compiled kernel takes: registers, and the stack that they spill to, per thread; the rest per program."""

    kernel: str
    target: str
    binary_bytes: int
    registers: int
    registers_allowed: int
    stack_bytes: int
    shared_bytes: int


def variants(module: str) -> list[Variant]:
    """The forms in which the kernels of one of MODULES are launched."""
    return list(importlib.import_module(f"qlora_kernels.{module}").variants())


def compile_variant(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel for one of TARGETS, whose `asm` holds "ptx" and "cubin", or "amdgcn" and "hsaco"."""
    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    # What a launch finds out by itself: these pointers and sizes are multiples of 16.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in variant.aligned
    }
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=variant.options)


def usage(variant: Variant, target: str) -> Usage:
    """Compile one variant and read what it takes: no GPU is needed."""
    compiled = compile_variant(variant, target)
    if "cubin" in compiled.asm:
        binary = compiled.asm["cubin"]
        registers, stack_bytes = _registers_and_stack_of_cubin(binary)
    else:
        binary = compiled.asm["hsaco"]
        registers, stack_bytes = _registers_and_stack_of_assembly(compiled.asm["amdgcn"])
    return Usage(variant.name, target, len(binary), registers, variant.registers, stack_bytes, compiled.metadata.shared)


def _registers_and_stack_of_cubin(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        # The one that Triton brings along.
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _registers_and_stack_of_assembly(assembly: str) -> tuple[int, int]:
    def size(key: str) -> int:
        found = re.search(rf"^ +{re.escape(key)}: +(\d+)$", assembly, re.MULTILINE)
        assert found is not None, key
        return int(found[1])

    return size(".vgpr_count"), size(".private_segment_fixed_size")


def _jobs(modules: Iterable[str], targets: Sequence[str], *, one_per_kernel: bool) -> list[tuple[str, int, str]]:
    """Module, position among its variants, and target: what a process of its own can be told."""
    jobs = []
    for module in modules:
        seen: set[Any] = set()
        for position, variant in enumerate(variants(module)):
            if not (one_per_kernel and variant.kernel in seen):
                jobs += [(module, position, target) for target in targets]
            seen.add(variant.kernel)
    return jobs


def _usage_of_job(job: tuple[str, int, str]) -> Usage:
    module, position, target = job
    return usage(variants(module)[position], target)


def main() -> None:
    """Print one JSON object per kernel and target."""
    parser = argparse.ArgumentParser(prog="python -m qlora_kernels.ahead_of_time", description=main.__doc__)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES, help="of this package (default: all)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=tuple(TARGETS), help="(default: all)")
    parser.add_argument("--one-per-kernel", action="store_true", help="only the first variant of each kernel")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile at once (default: %(default)s)"
    )
    arguments = parser.parse_args()
    jobs = _jobs(arguments.modules, arguments.targets, one_per_kernel=arguments.one_per_kernel)
    if arguments.processes == 1:
        _print(map(_usage_of_job, jobs))
        return
    # Not forked: importing torch has started threads.
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        _print(pool.map(_usage_of_job, jobs))


def _print(rows: Iterable[Usage]) -> None:
    for row in rows:
        print(json.dumps(row._asdict()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
