"""The embedded demo: a tiny LLaMA, a dataset of a skill it lacks, and the scripts that make both."""
