"""Experts whose frozen weights are held as codes and scales, and how weights become codes and come back.

``dmoe.quant.quantize(model, "nf4")`` puts a :class:`QuantizedProjection` in the place of each projection of a model's
experts; the formats are those of :mod:`dmoe.ops.weight_formats`. Products decode blocks of them, forward and backward,
so that no weight is ever there as a whole; gradients reach what stands before and beside them (adapters, biases, the
router), and are exact for the decoded values. :func:`from_torchao` and :func:`from_bitsandbytes` read what those
packages hold, and :func:`assign` puts such a value into experts.
"""

from dmoe.expert_targets import TARGETS
from dmoe.quant.bitsandbytes_tensors import from_bitsandbytes
from dmoe.quant.convert import assign, dequantize, quantize
from dmoe.quant.mxfp4_files import from_mxfp4
from dmoe.quant.projection import QuantizedProjection
from dmoe.quant.torchao_tensors import from_torchao

__all__ = [
    "TARGETS",
    "QuantizedProjection",
    "assign",
    "dequantize",
    "from_bitsandbytes",
    "from_mxfp4",
    "from_torchao",
    "quantize",
]
