"""helixc: compiles a declarative Helix-parallel deployment into a proven plan and specialised kernels."""

__version__ = "0.1.0"
