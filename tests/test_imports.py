"""The package's place beside Hugging Face's `tokenizers`, and what importing it costs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_source_root_is_not_a_package():
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "tokenizers").iterdir() if path.name != "__pycache__"] == ["vistok"]


@pytest.mark.skipif(
    (importlib.util.find_spec("tokenizers") or type("", (), {"origin": None})).origin is None,
    reason="Hugging Face's tokenizers is not installed",
)
def test_hugging_faces_tokenizers_is_not_shadowed_at_the_root():
    result = run("import tokenizers; print(tokenizers.__file__); from tokenizers import Encoding")
    assert result.returncode == 0, result.stderr
    assert "site-packages" in result.stdout


def test_importing_vistok_imports_neither_lightning_nor_hydra():
    heavy = "{'lightning', 'hydra', 'omegaconf', 'torchmetrics', 'wandb', 'webdataset', 'matplotlib', 'timm'}"
    result = run(
        f"import sys, vistok; loaded = {heavy} & set(sys.modules); assert not loaded, loaded",
        PYTHONPATH=str(ROOT / "tokenizers"),
    )
    assert result.returncode == 0, result.stderr


def test_the_public_api_is_complete():
    import vistok

    assert {"load", "save", "build", "Tokenizer", "Quantizer", "Quantized", "__version__"} <= set(vistok.__all__)
    assert all(hasattr(vistok, name) for name in vistok.__all__)
