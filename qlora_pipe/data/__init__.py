"""From the rows of a dataset to batches of tokens: read, render, tokenise, mask, split, order, batch."""
