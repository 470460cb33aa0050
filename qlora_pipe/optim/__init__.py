"""Optimizers of the adapters."""
