"""TensorRT-LLM's configuration files: recognising them, their vocabulary, and reading them as a deployment file."""
