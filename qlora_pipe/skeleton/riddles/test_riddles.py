"""The dataset riddles reads its rows, refuses bad ones by file and line, and is installed."""

from pathlib import Path

from qlora_pipe.dataset import prompt_and_answer
from qlora_pipe.skeleton.riddles import DATASET
from qlora_pipe.testing import RunCli, check_dataset

pytest_plugins = ["qlora_pipe.testing.fixtures"]
ROWS = Path(__file__).with_name("rows.jsonl")


def test_the_dataset_conforms() -> None:
    first = prompt_and_answer("What has keys and opens nothing? ", "A piano", origin="rows.jsonl:1")
    check_dataset(DATASET, ROWS, expected=[first])


def test_the_plugin_is_installed(run_cli: RunCli) -> None:
    assert '"riddles"' in run_cli("plugins", "--json").stdout, "install it first: pip install -e ."
