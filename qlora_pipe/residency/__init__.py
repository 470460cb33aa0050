"""Where a model's weights live while it works: on the device, passing through it block by block, or in host memory.

`image` says which bytes of which files make up a block, `feeder` brings them to the device, `ring` lets them pass
through a few slots in the order in which a model's blocks run, `pinned` holds them in host memory, `layout` joins
these, and `choice` decides between them. docs/architecture.md has the whole.
"""
