"""Text: tokenizer, chat prompts, replies and stop texts."""
