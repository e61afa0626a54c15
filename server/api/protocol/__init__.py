"""Request bodies: what each route takes, field by field, and nothing accepted that is not served."""
