"""Fine-tune a small planner: from TinyAgent data to a measured plan success.

The names below are the Python API (docs/python.md). Each is imported when it is first used, so that
`import tinyagent_fast` takes no time and loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tinyagent_fast.privacy import turn_reports_off
from tinyagent_fast.version import __version__

if TYPE_CHECKING:
    from tinyagent_fast.api import (
        evaluate_run,
        export_run,
        load_tools,
        run_agent,
        score_pairs,
        train,
    )
    from tinyagent_fast.config import (
        Config,
        DataConfig,
        EvalConfig,
        LoraConfig,
        ModelConfig,
        TrainConfig,
        dump_config,
    )
    from tinyagent_fast.data.generation.catalogue import load_catalogue
    from tinyagent_fast.errors import GateError, UserError
    from tinyagent_fast.evaluation.evaluate import EvalChanges, EvalOptions
    from tinyagent_fast.export.settings import ExportSettings
    from tinyagent_fast.inference.planner import PlannedRequest, Planner, load
    from tinyagent_fast.plans.drawing import draw_plan
    from tinyagent_fast.presets import load_config, preset_config
    from tinyagent_fast.runs import Run, find_run

__all__ = [
    "Config",
    "DataConfig",
    "EvalChanges",
    "EvalConfig",
    "EvalOptions",
    "ExportSettings",
    "GateError",
    "LoraConfig",
    "ModelConfig",
    "PlannedRequest",
    "Planner",
    "Run",
    "TrainConfig",
    "UserError",
    "__version__",
    "draw_plan",
    "dump_config",
    "evaluate_run",
    "export_run",
    "find_run",
    "load",
    "load_catalogue",
    "load_config",
    "load_tools",
    "preset_config",
    "run_agent",
    "score_pairs",
    "train",
]

_MODULES = {
    "api": ("evaluate_run", "export_run", "load_tools", "run_agent", "score_pairs", "train"),
    "config": (
        "Config",
        "DataConfig",
        "EvalConfig",
        "LoraConfig",
        "ModelConfig",
        "TrainConfig",
        "dump_config",
    ),
    "data.generation.catalogue": ("load_catalogue",),
    "errors": ("GateError", "UserError"),
    "evaluation.evaluate": ("EvalChanges", "EvalOptions"),
    "export.settings": ("ExportSettings",),
    "inference.planner": ("PlannedRequest", "Planner", "load"),
    "plans.drawing": ("draw_plan",),
    "presets": ("load_config", "preset_config"),
    "runs": ("Run", "find_run"),
}

turn_reports_off()


def __getattr__(name: str) -> object:
    """Import a name of the API from its module."""
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(f"tinyagent_fast.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tinyagent_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the API for editors and notebooks."""
    return __all__
