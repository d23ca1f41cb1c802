"""Every loss preset lists every argument of its terms."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

import vistok.loss
from vistok.loss import Term

PRESETS = sorted(Path("configs/loss").glob("*.yaml"))
TERMS = [
    (f"{path.stem}.{name}", term)
    for path in PRESETS
    for name, term in (OmegaConf.load(path).get("terms") or {}).items()
]


@pytest.mark.parametrize(("name", "term"), TERMS, ids=[name for name, _ in TERMS])
def test_a_preset_lists_every_argument_of_its_term(name, term):
    cls = get_class(term._target_)
    assert {str(key) for key in term if key != "_target_"} == set(inspect.signature(cls).parameters)


def test_every_term_is_in_a_preset():
    public = {
        f"vistok.loss.{name}"
        for name in vistok.loss.__all__
        if inspect.isclass(cls := getattr(vistok.loss, name)) and issubclass(cls, Term) and not inspect.isabstract(cls)
    }
    assert {term._target_ for _, term in TERMS} == public
