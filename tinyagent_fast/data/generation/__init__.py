"""The generated dataset: requests and plans in the published schema, from a tool catalogue."""
