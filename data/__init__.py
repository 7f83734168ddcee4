"""Text in, token batches out: corpora, tokenizers, batches, and prepare, which joins the first two."""
