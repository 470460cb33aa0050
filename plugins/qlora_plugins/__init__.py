"""The plugins that come with qlora_pipe, each as a stranger would write it."""
