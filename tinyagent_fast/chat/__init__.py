"""Try a planner by hand: a request in, its plan streamed and drawn, in a terminal or a browser."""
