"""The agent: a plan's calls are run, judged, and planned again where that helps."""
