"""Checkpoint files: safetensors source and sink, torch_dist checkpoints."""
