"""Base models: families, loading, and the small ones built on the spot."""
