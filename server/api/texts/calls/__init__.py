"""Formats in which models write calls of tools: how each is read as it comes, and the grammar of what may come."""
