"""Settings in YAML files: read with the file, line and key in every message, written without anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from svp.errors import SvpError

LIMIT_BYTES, LIMIT_DEPTH = 10_000_000, 40
OPENING = (
    yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken,
)  # fmt: skip
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(values, line of each top-level key) of a YAML file that holds one mapping.

    Raises SvpError (kind "usage") naming file and line when the file is missing, no YAML, has a key twice or an anchor.
    """
    path = Path(path)
    text = _text(path)
    try:
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
                raise _wrong(path, token.start_mark.line, f"the anchor or alias '{token.value}' is not read")
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > LIMIT_DEPTH:  # the time that YAML takes grows with the square of the depth
                raise _wrong(path, token.start_mark.line, f"values lie in more than {LIMIT_DEPTH} others")
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        problem = (err.problem or err.context or "it cannot be read").replace("'\\t'", "a tab; indent with spaces")
        raise _wrong(path, mark.line if mark else 0, problem) from err
    except (yaml.YAMLError, RecursionError, ValueError) as err:
        raise _wrong(path, 0, str(err).split("\n")[0] or type(err).__name__) from err
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise _wrong(path, 0, f"it holds {type(values).__name__}, expected `key: value` lines")
    assert isinstance(node, yaml.MappingNode)
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    return {str(key): value for key, value in values.items()}, lines


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, keys in their order."""
    return yaml.dump(plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """Tuples to lists and paths to text, all the way down: what YAML and JSON give back."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every entry in which two nested settings differ."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and _rows(a) and _rows(b) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                found += differences(x, y, f"{prefix}{key}.{i}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def _rows(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(row, dict) for row in values)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise SvpError(
                f"{path} has {path.stat().st_size:,} bytes, at most {LIMIT_BYTES:,} are read",
                "a YAML file of settings",
                "usage",
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise SvpError(f"{path} is not text", "give a YAML file", "usage") from err
    except OSError as err:
        raise SvpError(f"{path} cannot be read: {err.strerror or err}", "check the path", "usage") from err


def _wrong(path: Path, line: int, problem: str) -> SvpError:
    return SvpError(f"{path}, line {line + 1}: {problem}", "a YAML file with `key: value` lines is expected", "usage")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML lets the last one win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is no plain word", problem_mark=key.start_mark)
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
