"""Adapters as other servers' tools ask for them: the same lifecycle as /v1/adapters, with each server's own bodies,
status codes and texts. docs/api.md says where the answers differ from those servers', and why."""
