"""Data files to examples: reading, checking, caching, splitting, generating."""
