"""YAML as people write recipes: a loader that refuses a key given twice, and a dumper of what it reads."""

import re
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalars of YAML 1.2 where version 1.1 surprises.

    `1e-7` is a number (1.1 reads a word), `no` and `on` are words (1.1 reads booleans, so that
    `eval_strategy: no` would not be one), and a key given twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key given twice (YAML forbids it, PyYAML keeps the last one)."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, str | int | float):
                if key in lines:
                    problem = f"{key} is given twice, in lines {lines[key]} and {line}"
                    raise yaml.constructor.ConstructorError(problem=problem)
                lines[key] = line
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
# The table is shared with the parent class until it is replaced.
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


class RecipeDumper(yaml.SafeDumper):
    """Writes what `RecipeLoader` reads as the same: `1e-7` the word is quoted, `no` is not."""

    def ignore_aliases(self, data: Any) -> bool:
        """Values that are one object are written twice."""
        return True


RecipeDumper.yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers
