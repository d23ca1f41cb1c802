"""The commands and imports of README and docs exist: every override is one that the config has."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from vistok.cli.hydra_app import configs_folder

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CONFIGS = {"train": "train", "eval": "eval", "probe": "probe", "export-tokens": "export_tokens", "sample": "sample"}


def blocks(page, language):
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """Command lines that take overrides: the config, the overrides, and where they stand."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                program = re.match(r"(?:uv run |python )?(?:(train|eval)\.py|vistok (\S+))", line)
                if program is None or (name := program[1] or program[2]) not in CONFIGS:
                    continue
                if "--config-dir" in words:  # with files that tests/cli/test_plugins.py writes and runs
                    continue
                start = next(i for i, word in enumerate(words) if word in (f"{name}.py", name)) + 1
                given = [word for word in words[start:] if word not in ("...", "-m", "--help")]
                yield pytest.param(CONFIGS[name], given, id=f"{page.stem}: {line.split('#')[0].strip()}")


def single(override):
    """An override of the last job, where a sweep lists several."""
    parsed = OverridesParser.create().parse_override(override)
    return (
        f"{parsed.input_line.split('=')[0]}={list(parsed.sweep_string_iterator())[-1]}"
        if parsed.is_sweep_override()
        else override
    )


@pytest.mark.parametrize(("config", "overrides"), [*commands()])
def test_a_documented_command_has_overrides_that_exist(config, overrides):
    # Composing refuses what is not there; what a + adds at the top level is read by nothing.
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        plain = compose(config)
        composed = compose(config, overrides=[single(each) for each in overrides])
    assert set(composed) <= set(plain)
    assert composed != plain or not overrides


def test_every_page_with_commands_is_looked_at():
    assert len(list(commands())) > 40


def exists(module, name):
    """Whether ``from module import name`` works, for attributes as for modules."""
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documented_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vistok"):
                missing = [name.name for name in node.names if not exists(str(node.module), name.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_the_code_for_those_who_come_from_another_library_runs():
    pytest.importorskip("vector_quantize_pytorch")
    names = {"features": torch.randn(2, 100, 16)}
    theirs, ours = blocks(ROOT / "docs" / "migrating.md", "python")
    exec(theirs, names)
    exec(ours, names)
    assert names["q"].codes.shape == names["quantized"].mT.shape
    assert names["q"].indices.shape == names["indices"].shape
