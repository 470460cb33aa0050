"""What a kernel is compiled as: one specialisation, and what a launch would find out about its arguments."""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One specialisation of a Triton kernel, named by what it is specialised for.

    `signature` gives the types of the arguments that are not constants, "*fp32", "i32" and so on; pointers are taken to
    be multiples of 16 bytes, as an allocation's are, and the arguments named in `aligned` to be multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    aligned: tuple[str, ...] = ()
    registers: int = 128
    """The most that a thread may take on sm_80 and sm_90, a promise that the tests keep: more, and too few programs run
    at once to hide the memory's latency. At 128, 512 threads share a multiprocessor."""
