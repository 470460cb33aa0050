"""What plugins build models from: norms, rotary embeddings, attention, the key-value cache, a config's fields.

The modules are imported by their own names (`from qlora_pipe.nn.norm import RMSNorm`), so that reading a config's
fields costs no import of torch.
"""
