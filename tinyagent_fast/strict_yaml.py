"""YAML as configs and catalogues need it: a key given twice is a mistake, not a choice.

PyYAML keeps the last of two equal keys and says nothing, so half of a file could be lost. It takes
`off`, `no` and `on` for truth values and `12:30` for a number, which are texts here and in YAML
1.2. Its aliases can make a few lines as large as the memory, and its tags say nothing that a
setting needs. It takes 8 s for a megabyte; its loader in C is faster, but deep nesting ends it, and
the process with it, so long texts are refused instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

_PLAIN = {
    "bool": ("^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"^[-+]?(?:0|[1-9][0-9_]{0,999}|0x[0-9a-fA-F]{1,999})$", "-+0123456789"),
    "float": (
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}
"""What a plain text must look like to be one of these, and the characters that it begins with."""
_MOST_CHARACTERS = 250_000
"""Of a document; the built-in catalogue has a tenth of that, and 2 s are enough to wait."""
_SPARE_CHARACTERS = 100_000
"""What aliases may add to a document, beside three times its own size."""


def read_yaml_text(path: Path) -> str:
    """Read a file for `load_yaml`, and of one that is too long only as much as shows that."""
    with path.open(encoding="utf-8") as file:
        return file.read(_MOST_CHARACTERS + 1)


def load_yaml(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document.

    Returns:
        Plain values: dicts, lists, strings, numbers, booleans, dates and None.

    Raises:
        ValueError: The text is no YAML or too long, a mapping has a key twice, a value has a tag,
            or aliases make it too large; the message says where.
    """
    import yaml

    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it has more than {_MOST_CHARACTERS:,} characters")

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if getattr(event, "tag", None) not in (None, "!"):
                line = event.start_mark.line + 1
                tag = event.tag.replace("tag:yaml.org,2002:", "!!")
                raise ValueError(f"line {line}: the tag {tag} has no meaning here; leave it out")
            return super().compose_node(parent, index)

        def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
            # JSON escapes an emoji as two halves, which YAML leaves apart.
            halves = super().construct_scalar(node).encode("utf-16-le", "surrogatepass")
            return halves.decode("utf-16-le", "surrogatepass")

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue  # only a text, a number or the like can be a key
                merges = key.tag.endswith(":merge")  # its value is taken over, it is no key
                value = key.value if merges else self.construct_object(key)
                if value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"the key `{key.value}` is given twice, again in line {line}")
                seen.add(value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.split(":")[-1] not in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, (pattern, first) in _PLAIN.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), list(first))
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _characters(node, {}) > 3 * len(text) + _SPARE_CHARACTERS:
            raise ValueError("its aliases make it too large; write out what is meant")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _characters(node: yaml.Node, known: dict[int, int]) -> int:
    """Count what a node would take with its aliases written out, at least one a value."""
    if id(node) not in known:
        known[id(node)] = -1  # it is being counted
        parts = [node.value] if isinstance(node.value, str) else _flat(node.value)
        known[id(node)] = 1 + sum(
            len(part) if isinstance(part, str) else _characters(part, known) for part in parts
        )
    if known[id(node)] < 0:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias leads back to itself")
    return known[id(node)]


def _flat(parts: list[Any]) -> list[Any]:
    """List the nodes of a sequence, or those of the keys and values of a mapping."""
    return [node for part in parts for node in (part if isinstance(part, tuple) else (part,))]
