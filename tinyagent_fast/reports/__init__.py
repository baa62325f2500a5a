"""What a run gave, as one HTML page and as Markdown: last stage, needs no torch and no network."""
