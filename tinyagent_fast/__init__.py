"""Fine-tune a small planner: from TinyAgent data to a measured plan success."""

__version__ = "0.1.0"
