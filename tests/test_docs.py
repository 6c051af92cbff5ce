"""All that the documents say of this tree is so: paths are there, commands exist, lines can be read in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from cluster.cli.main import app

ROOT = Path(__file__).parent.parent
PROSE = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "k8s" / "README.md",
         *sorted((ROOT / "examples").rglob("*.md"))]
MAX_CHARACTERS = 120
_ENDINGS = r"md|py|pyi|c|h|proto|yaml|yml|toml|txt|json|html"
_FILE = re.compile(rf"[\w.-]+(?:/[\w.-]+)*\.(?:{_ENDINGS})")
_FOLDER = re.compile(r"[\w.-]+(?:/[\w.-]+)*/")
_USERS_OWN = {"my.yaml", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines outside of code blocks and tables."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and not line.startswith(("|", "    ")):
            yield number, line


def words_in_backticks(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


@cache
def tree() -> frozenset[str]:
    """Return all files and folders of the parts of this tree, from the top, and the files of the top."""
    parts = [path for name in ("model", "serving", "cluster", "tests", "docs", "benchmarks", "examples", "k8s")
             for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    return frozenset(map(name_of, [*parts, *(path for path in ROOT.iterdir() if path.is_file())]))


def is_in_tree(name: str) -> bool:
    """Return whether it is a path from the top, or the end of one."""
    return any(path == name.rstrip("/") or path.endswith("/" + name.rstrip("/")) for path in tree())


def test_what_counts_as_prose_and_as_a_path() -> None:
    assert len(PROSE) >= 6 and all(path.is_file() for path in PROSE)
    text = "one\n```\ncode\n```\n| a table |\n    code\nlast"
    assert list(prose_of(text)) == [(1, "one"), (7, "last")]
    assert is_in_tree("model/step.py") and is_in_tree("step.py") and is_in_tree("planner/layer/")
    assert not is_in_tree("model/nothing.py") and not is_in_tree("ep.py") and not is_in_tree("model/steps/")


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_lines_of_prose_can_be_read(path: Path) -> None:
    long = [number for number, line in prose_of(path.read_text()) if len(line) > MAX_CHARACTERS]
    assert not long, f"{name_of(path)}: lines {long} have more than {MAX_CHARACTERS} characters"


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_paths_are_there(path: Path) -> None:
    text = path.read_text()
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link} - {""}
    named = {word for word in words_in_backticks(text) if _FILE.fullmatch(word) or _FOLDER.fullmatch(word)} - _USERS_OWN
    absent = [link for link in links if not (path.parent / link).exists()]
    absent += [name for name in named if not is_in_tree(name)]
    assert not absent, f"{name_of(path)} names {sorted(absent)}, which are not there"


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_links_to_headings_are_there(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        text = (path.parent / target).read_text() if target else path.read_text()
        headings = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
                    for heading in re.findall(r"(?m)^#+ (.+)$", text)}
        assert anchor in headings, f"{name_of(path)} links to #{anchor}, which is no heading of {target or 'itself'}"


def commands() -> dict[str, set[str]]:
    """Return the commands of `moesaic`, each with its own subcommands."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return {name: set(getattr(command, "commands", ())) for name, command in group.commands.items()}


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_commands_exist(path: Path) -> None:
    known = commands()
    named = re.findall(r"(?m)(?:^|[`/])moesaic ([a-z]+)\b((?: [a-z]+(?: \| [a-z]+)*)?)", path.read_text())
    for name, rest in named:
        assert name in known, f"{name_of(path)} names `moesaic {name}`: there are {sorted(known)}"
        unknown = set(re.findall(r"[a-z]+", rest)) - known[name] if known[name] else set()
        assert not unknown, f"{name_of(path)} names `moesaic {name}` {unknown}: there are {sorted(known[name])}"
