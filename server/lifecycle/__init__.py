"""What happens to adapters while others decode: what a name means now, how that changes, and who uses what."""
