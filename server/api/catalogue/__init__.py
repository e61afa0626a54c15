"""The routes for what is served: models, adapters, aliases, uploads and the store."""
