"""The examples of docs/plugins.md, run as they stand there."""

import re
import types
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"


def example(name: str) -> types.ModuleType:
    """Run the block of docs/plugins.md that begins with `# NAME.py`."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for indent, code in blocks:
        text = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        if text.startswith(f"# {name}.py\n"):
            module = types.ModuleType(name)
            exec(compile(text, f"docs/plugins.md:{name}", "exec"), module.__dict__)
            return module
    raise AssertionError(f"docs/plugins.md has no example {name}")
