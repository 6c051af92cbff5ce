"""Text <-> tokens: tokenizer, detokenizer, chat template. May import: text.answers."""
