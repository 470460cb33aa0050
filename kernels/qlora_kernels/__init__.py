"""4-bit weights on tensors: quantize, dequantize, linear layers with LoRA adapters, rows, AdamW, LoftQ."""

from qlora_kernels.adamw import Moments8, Moments32, adamw_step, coefficients
from qlora_kernels.blockwise import BLOCK_SIZES, dequantize_reference
from qlora_kernels.decode_attention import decode_attention
from qlora_kernels.dispatch import dequantize, quantize, squared_error
from qlora_kernels.frozen_head import head_loss
from qlora_kernels.gated import geglu, swiglu
from qlora_kernels.levels import LEVELS, Kind, recognise
from qlora_kernels.linear import lora_linear
from qlora_kernels.loftq import loftq_quantize, low_rank, starting_pair
from qlora_kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.quantized_matmul import quantized_matmul, serves
from qlora_kernels.rotary import rotate, rotate_reference

__all__ = [
    "BLOCK_SIZES",
    "LEVELS",
    "Kind",
    "Moments8",
    "Moments32",
    "QuantizedTensor",
    "adamw_step",
    "add_rms_norm",
    "coefficients",
    "decode_attention",
    "dequantize",
    "dequantize_reference",
    "geglu",
    "head_loss",
    "loftq_quantize",
    "lora_linear",
    "low_rank",
    "quantize",
    "quantized_matmul",
    "recognise",
    "rms_norm",
    "rms_norm_reference",
    "rotate",
    "rotate_reference",
    "serves",
    "squared_error",
    "starting_pair",
    "swiglu",
]
