"""Export of RelDN as one graph of tensors: TorchScript, or ONNX for other runtimes."""

from .graphs import OUTPUT_NAMES, GivenBoxesExport, RelDNExport
from .onnx_file import save_onnx
from .torchscript_file import save_torchscript

__all__ = ["OUTPUT_NAMES", "GivenBoxesExport", "RelDNExport", "save_onnx", "save_torchscript"]
