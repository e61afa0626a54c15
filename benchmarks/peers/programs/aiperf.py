"""AIPerf's own command is what runs: this file only says what it needs."""
# /// script
# dependencies = ["aiperf"]
# ///
