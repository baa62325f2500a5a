"""Predictions to scores: the published metric, our own, intervals, reports."""
