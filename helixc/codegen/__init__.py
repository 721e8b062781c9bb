"""Kernels: problem (KernelSpec) -> choice (KernelConfig) -> text (KernelSource) -> binary (Cubin)."""
