"""An entry of a data file as the published schema has it."""

from __future__ import annotations

from typing import Any


def make_entry(query: str = "Call Ann", system: str = "Plan it.") -> dict[str, Any]:
    """Make an entry with a plan and a join point, as decoded JSON."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question: {query}"},
    ]
    return {
        "input": query,
        "output": [
            {
                "type": "plan",
                "raw_input": repr(messages),
                "raw_output": '1. get_phone_number("Ann")\n2. join()',
                "parsed_output": [
                    {"tool_name": "get_phone_number", "tool_args": ["Ann"]},
                    {"tool_name": "join", "tool_args": []},
                ],
                "id": "p",
                "index": 0,
            },
            {
                "type": "join",
                "raw_input": "Follow the rules.",
                "raw_output": "Action: Finish(Done)",
                "parsed_output": {"thought": "", "action": "Finish", "message": "Done"},
                "id": "j",
                "index": 1,
            },
        ],
        "closest_5_queries": ["Call Bob"],
    }
