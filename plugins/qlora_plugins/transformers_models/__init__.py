"""Any other family: models built with transformers, whose linear layers are ours.

The one place that runs on transformers, which the extra `qlora-pipe[transformers]` installs. A family with a plugin of
its own never comes here.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from qlora_pipe.architecture import Architecture
from qlora_pipe.hookspecs import hookimpl


@hookimpl(trylast=True)
def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Make a family of what transformers builds for this config; None where it is not installed or knows none."""
    if find_spec("transformers") is None:
        return None
    from qlora_plugins.transformers_models.family import family_of

    return family_of(config)
