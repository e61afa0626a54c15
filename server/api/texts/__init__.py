"""Text to tokens and back: the tokenizer, chat templates in their sandbox, and answers piece by piece."""
