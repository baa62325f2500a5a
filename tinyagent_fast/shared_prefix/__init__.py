"""Rows that share prefixes: what they have in common is computed once, in training and decoding."""
