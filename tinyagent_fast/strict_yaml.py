"""YAML as configs and catalogues need it: a key given twice is a mistake, not a choice.

PyYAML keeps the last of two equal keys and says nothing, so half of a file could be lost; and it
takes `off`, `no` and `on` for truth values, which are names here and in YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any


def load_yaml(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document.

    Returns:
        Plain values: dicts, lists, strings, numbers, booleans, dates and None.

    Raises:
        ValueError: The text is no YAML, or a mapping has a key twice; the message says where.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise ValueError(
                            f"the key `{key.value}` is given twice, again in line {line}"
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    truth = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != truth]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        truth, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML's constructors meet a value that its tag does not fit, such as `!!timestamp x`.
        raise ValueError(f"a value does not fit its tag: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
