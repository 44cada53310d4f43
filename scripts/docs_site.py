"""Pages of the site that are not in docs/ (a hook of mkdocs.yml): files beside it, and those made of the code."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the clone, where it is not installed

from nemo_aligner.commands import plan
from nemo_aligner.commands.cli import COMMANDS, CONFIGURED, summary
from nemo_aligner.config.keys import Key, keys_of
from scripts.site_pages import errors, migration

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files beside docs/, and what each is called in the site."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    named = str(config.nav)
    [guides] = [section["Guides"] for section in config.nav or [] if "Guides" in section]
    guides += [path.name for path in sorted(Path(config.docs_dir).glob("*.md")) if f"'{path.name}'" not in named]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    texts = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    texts |= {page: "\n".join(lines()) for page, lines in MADE.items()}
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return relinked(markdown)


def relinked(markdown: str) -> str:
    """Links of the repository's files as links of the site's pages, which lie in one folder."""

    def there(found: re.Match[str]) -> str:
        opening, path, rest = found.groups()
        name = path.removeprefix("../").removeprefix("docs/")
        return f"{opening}{PAGES.get(name, name)}{rest}"

    return re.sub(r"(\]\(|src=\")((?:\.\./|docs/)?[\w./-]+\.\w+)([#)\"])", there, markdown)


def keys_page() -> Iterator[str]:
    """Every key of every command with its default and meaning, as `--help` has them."""
    yield "# Every key"
    yield ""
    yield "What `aligner <command> --help` prints. `???` must be given; `${...}` is the value of another key."
    for command in CONFIGURED:
        entry = importlib.import_module(COMMANDS[command]).main
        yield f"\n## aligner {command}\n\n{summary(COMMANDS[command])}. YAML: `{entry.config_name}`.\n"
        yield from _table(keys_of(entry.config_dir, entry.config_name))
    yield f"\n## aligner plan\n\n{summary(COMMANDS['plan'])}.\n"
    yield from _table(plan.plan_keys())


def _table(keys: Iterable[Key]) -> Iterator[str]:
    yield "| key | default | |"
    yield "|---|---|---|"
    for key in keys:
        if key.default is not None or key.comment:
            default = "" if key.default is None else f"`{_cell(key.default)}`"
            yield f"| `{key.name}` | {default} | {_cell(re.sub(r'([<>*_`])', _escaped, key.comment))} |"


MADE = {"keys.md": keys_page, "errors.md": errors.page, "migration_keys.md": migration.page}
"""Pages made of the code, and what makes them."""


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _escaped(found: re.Match[str]) -> str:
    return f"\\{found[0]}"
