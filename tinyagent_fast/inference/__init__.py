"""Prompts to text: batched greedy decoding, and the proof that batching changes nothing."""
