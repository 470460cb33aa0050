"""Any dataset of the Hub, `hub:USER/NAME`: `prompt` and `answer`, or `messages`, or what `--map` gives these names."""

from qlora_pipe.dataset import ANY_REPOSITORY, Dataset
from qlora_pipe.rows import table_rows
from qlora_plugins.datasets.jsonl import example

DATASET = Dataset(
    name="hub",
    help="a dataset of the Hub, hub:USER/NAME[/FOLDER][@REVISION], with prompt and answer or with messages",
    rows=table_rows,
    example=example,
    hub=ANY_REPOSITORY,
    fields=("prompt", "answer", "messages"),
)
