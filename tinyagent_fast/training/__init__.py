"""Rows to adapter: models, trainer, checks, resume."""
