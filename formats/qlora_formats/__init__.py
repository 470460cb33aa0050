"""Bytes on disk: safetensors, the 4-bit store, Hugging Face checkpoints, PEFT adapters, manifests and commits.

This package knows no arithmetic and imports nothing else of the project. `commit` is the one module that opens
files for writing; `errors`, `strict_json`, `manifest`, `header` and `commit` import no torch.
"""
