"""Clients that people have already, unmodified, against one real server: ``make clients``."""
