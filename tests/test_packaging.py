"""The files that describe the project agree with each other."""

import importlib.util
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def name(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def test_constraints_txt_equals_the_tested_versions_of_pyproject():
    spec = importlib.util.spec_from_file_location("constraints", ROOT / "scripts" / "constraints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "constraints.txt").read_text() == module.constraints()


def test_every_core_dependency_has_a_lower_bound_and_tested_versions():
    tested = {name(line): line for line in PYPROJECT["tool"]["uv"]["constraint-dependencies"]}
    for requirement in PYPROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+>=[\d.]+", requirement), requirement
        assert tested[name(requirement)].startswith(requirement + ","), requirement


def test_no_file_of_the_project_names_an_address_of_a_registry():
    for file in ("pyproject.toml", "constraints.txt"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / file).read_text())


def test_every_core_dependency_is_imported_by_the_package_or_a_config():
    modules = {
        "hydra-core": "hydra",
        "huggingface-hub": "huggingface_hub",
        "pillow": "PIL",
        "scikit-image": "skimage",
        "scikit-learn": "sklearn",
        "typing-extensions": "typing_extensions",
        # The Inception network inside torchmetrics.
        "torch-fidelity": "FrechetInceptionDistance",
        # Used through Lightning's TensorBoardLogger.
        "tensorboard": "TensorBoardLogger",
    }
    files = [*(ROOT / "tokenizers").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    text = "\n".join(path.read_text() for path in files)
    unused = [
        requirement
        for requirement in map(name, PYPROJECT["project"]["dependencies"])
        if modules.get(requirement, requirement) not in text
    ]
    assert unused == []
