"""What `qlora-pipe plugins new` begins a plugin with: one whole example of each kind, and the writing of a new one.

The examples are modules like any other, with their tests beside them; docs/plugins.md shows them.
"""

from typing import Literal

Kind = Literal["architecture", "dataset", "exporter"]
