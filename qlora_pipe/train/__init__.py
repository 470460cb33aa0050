"""The training loop, its checkpoints, and what keeps it from going wrong unseen."""
