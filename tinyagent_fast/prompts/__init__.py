"""Examples to token ids and labels: the one renderer, tokenizers, proved rows."""
