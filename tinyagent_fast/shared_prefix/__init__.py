"""Exact training on rows that share prefixes: what rows have in common is computed once."""
