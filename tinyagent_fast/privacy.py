"""Nothing is sent anywhere: the usage reports of the libraries are turned off before they load."""

from __future__ import annotations

import os
import sys

_OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, by which trl, transformers and others send
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # transformers asks the hub for a converted copy of weights that are not safetensors.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}


def turn_reports_off() -> None:
    """Turn usage reports off for this process and its children, whatever was set before."""
    os.environ.update(_OFF)
    # A program that has imported the hub's library before has fixed what it read.
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
