"""Text in, token batches out: corpora, tokenizers, batches, prepare, and what tokenises large corpora ahead of runs."""
