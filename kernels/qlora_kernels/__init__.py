"""4-bit weights on tensors: quantize, dequantize, the linear layer with a LoRA adapter, and LoftQ."""

from qlora_kernels.blockwise import BLOCK_SIZES, dequantize_reference
from qlora_kernels.dispatch import dequantize, quantize, squared_error
from qlora_kernels.levels import LEVELS, Kind, recognise
from qlora_kernels.linear import lora_linear
from qlora_kernels.loftq import loftq_quantize, low_rank, starting_pair
from qlora_kernels.quantized import QuantizedTensor

__all__ = [
    "BLOCK_SIZES",
    "LEVELS",
    "Kind",
    "QuantizedTensor",
    "dequantize",
    "dequantize_reference",
    "loftq_quantize",
    "lora_linear",
    "low_rank",
    "quantize",
    "recognise",
    "squared_error",
    "starting_pair",
]
