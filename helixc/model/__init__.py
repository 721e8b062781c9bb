"""Model geometry: a checkpoint folder's config.json or a built-in name becomes a ModelArch."""

from helixc.model.builtin import builtin_names
from helixc.model.hf_config import ModelError, is_builtin, native_dtype, read_model

__all__ = ["ModelError", "builtin_names", "is_builtin", "native_dtype", "read_model"]
