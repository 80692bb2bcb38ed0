"""Parse YAML that somebody wrote: every fault of the text is a ValueError, and no text costs more memory than it is long."""

from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        ValueError: it is not valid, nested too deeply, or much larger than it is written.
    """
    try:
        return yaml.load(text, _SafeLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply; a recipe has sections, keys and values") from None
    except Exception as error:  # of a value with a tag or the form of a date, the loader raises bare errors of many kinds
        raise ValueError(str(error)) from None


class _SafeLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses duplicate keys (YAML forbids them, but the loader silently keeps the last), and
    aliases by which a few lines become more values than memory holds."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > _MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"its aliases make more than {_MOST_VALUES} values of it")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(map(str, twice))} given twice in one section", node.start_mark
            )
        return super().construct_mapping(node, deep)


_MOST_VALUES = 100_000


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """The number of values that a node stands for, each alias counted as what it names."""
    if node not in sizes:
        sizes[node] = _MOST_VALUES + 1  # for an alias inside what it names
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        sizes[node] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[node]
