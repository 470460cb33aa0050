"""`python -m qlora_pipe`."""

from qlora_pipe.cli import main

main()
