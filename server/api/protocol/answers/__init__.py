"""What routes answer, field by field: for the document at /openapi.json, and for tests to hold answers to it."""
