"""From the composed YAML to typed dataclasses, once, with every fault found named by its full key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.config.aliases import Aliases, renamed
from nemo_aligner.errors import ConfigError

T = TypeVar("T")


def load_config(cfg: DictConfig, schema: type[T], aliases: Aliases | None = None) -> T:
    """`cfg` as an instance of the dataclass `schema`; keys under the older names of `aliases` are renamed first.

    Raises ConfigError with all unknown keys (also those added with `++`), wrong types and missing `???` values, one
    after another on one line. A `validate()` method of `schema` is called at the end.
    """
    cfg = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    cfg = renamed(cfg, aliases or {})
    _resolve_escaped(cfg, cfg)
    faults = [*_unknown_keys(cfg, schema, "")]
    if not faults:
        faults = [*_wrong_values(cfg, schema)]
    if faults:
        raise ConfigError("; ".join(faults))
    result = cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg)))
    _unescape_texts(result)
    if hasattr(result, "validate"):
        result.validate()
    return result


_TEXTS = {"prompt_template", "reward_prompt_template", "reward_template", "end_strings"}
"""Keys whose values are pieces of what a model reads or writes."""

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def _unescape_texts(block: Any) -> None:
    r"""`\n`, `\t` and `\\` of templates and end strings become what they mean: a shell cannot pass them easily."""

    def meant(text: Any) -> Any:
        return re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], text) if isinstance(text, str) else text

    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if dataclasses.is_dataclass(value):
            _unescape_texts(value)
        elif field.name in _TEXTS:
            setattr(block, field.name, [meant(one) for one in value] if isinstance(value, list) else meant(value))


def _resolve_escaped(node: Any, root: DictConfig) -> None:
    """A value quoted once too often arrives as the text `${multiply:1e-6,1.001}`: take it as what it is."""
    keys: list[Any] = list(node.keys() if isinstance(node, DictConfig) else range(len(node)))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            raw = cast(Any, OmegaConf.to_container(node, resolve=False))[key]
            if isinstance(raw, str) and raw.startswith("\\${"):
                node[key] = raw[1:]
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            _resolve_escaped(value, root)


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass of an annotation such as `X`, `X | None`; None where there is none."""
    return next((a for a in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(a)), None)  # type: ignore[return-value]


def _unknown_keys(node: DictConfig, schema: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(schema)
    for name in map(str, node):
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            yield f"{prefix}{name}: no such key" + (f", did you mean {prefix}{close[0]}" if close else "")
            continue
        inner = _dataclass_in(hints[name])
        if inner is not None and not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            value = node[name]
            if isinstance(value, DictConfig):
                yield from _unknown_keys(value, inner, f"{prefix}{name}.")


def _wrong_values(cfg: DictConfig, schema: type) -> Iterator[str]:
    """Wrong types, missing values, interpolations that lead nowhere."""
    typed = OmegaConf.structured(schema)
    try:
        merged = OmegaConf.merge(typed, cfg)
        missing = sorted(_missing(OmegaConf.to_container(merged, resolve=False)))
        if missing:
            yield from (f"{key}: required, but not given" for key in missing)
        else:
            OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as fault:
        # the merge stops at the first fault; taken leaf by leaf, every one is found and named
        faults = [*_faults_by_leaf(typed, cfg)]
        where = re.search(r"full_key: (\S+)", str(fault))
        yield from faults or [f"{where.group(1) if where else '(root)'}: {str(fault).splitlines()[0]}"]


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys without a value; those that refer to them have none of their own to give."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if value == "???":
            yield f"{prefix}{key}"
        yield from _missing(value, f"{prefix}{key}.")


def _faults_by_leaf(typed: DictConfig, cfg: DictConfig) -> Iterator[str]:
    for path, value in _leaves(cfg, ()):
        nested: Any = value
        for name in reversed(path):
            nested = {name: nested}
        try:
            OmegaConf.merge(typed, nested)
        except OmegaConfBaseException as fault:
            key = ".".join(path)
            wants_list = "is not a ListConfig" in str(fault)
            wants_block = "is not a subclass of" in str(fault)
            yield f"{key}: " + (
                f"a list is needed, {key}=[{value}]"
                if wants_list
                else f"{value!r} where keys are needed, {key}.NAME=..."
                if wants_block
                else str(fault).splitlines()[0]
            )


def _leaves(node: DictConfig, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in map(str, node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig) and len(value):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
