"""The model registry: policy versions, aliases, artefacts."""
