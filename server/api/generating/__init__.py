"""The routes that the engine answers: text, responses, messages, embeddings; and what they have in common."""
