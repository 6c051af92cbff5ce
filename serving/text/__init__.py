"""Text <-> tokens: tokenizer, detokenizer, chat template. May import: nothing of serving."""
