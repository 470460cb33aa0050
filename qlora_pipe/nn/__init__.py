"""What plugins build models from: a config's fields, norms, rotary embeddings, attention, caches, a whole decoder.

The modules are imported by their own names (`from qlora_pipe.nn.norm import RMSNorm`), so that reading a config's
fields costs no import of torch.
"""
