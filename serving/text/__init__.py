"""Text <-> tokens: tokenizer, detokenizer, chat template. May import: no other folder of serving."""
