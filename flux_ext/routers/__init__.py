"""The routers of a model: modules, collection, files."""
