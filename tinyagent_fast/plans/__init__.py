"""Plans: tools, grammar and dependency graph."""
