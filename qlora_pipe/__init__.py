"""Fine-tune a large language model on one GPU: NF4 store, LoRA, exact resume, merge and export."""
