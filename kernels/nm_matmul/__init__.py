"""Products with matrices whose weights are stored packed: 2:4 without its zeros, and dense, in tiles.

`layout` says how they lie, docs/format.md to the last byte; `reference` what a product is; `cpu`, `ort_op`
and `torch_op` are three doors to one compiled library. Importing this module imports neither torch nor ONNX
Runtime.
"""

from edgesft.kernels.nm_matmul.cpu import Native
from edgesft.kernels.nm_matmul.reference import Reference

IMPLEMENTATIONS = (Native(), Reference())
