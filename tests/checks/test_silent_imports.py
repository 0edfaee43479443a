"""The check of imports hears what a module says, and hides what the core dependencies do not bring."""

from __future__ import annotations

import pytest
import silent_imports

MODULES = {
    "quiet": "import numpy, torch\nfrom tokenizers import Tokenizer\n",
    "lazy": "def f():\n    import pytest\n",
    "prints": "print('hello')\n",
    "shouts": "import os\nos.system('echo from below >&2')\n",
    "warns": "import warnings\nwarnings.warn('old', DeprecationWarning)\n",
    "fails": "1 / 0\n",
    "leans": "import pytest\n",
    "guards": "try:\n    import pytest\nexcept ImportError:\n    pytest = None\n",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("modules")
    for name, source in MODULES.items():
        (folder / f"odd_{name}.py").write_text(source)
    return silent_imports.problems([f"odd_{name}" for name in MODULES], [folder])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prints", "hello"),
        ("shouts", "from below"),
        ("warns", "DeprecationWarning: old"),
        ("fails", "ZeroDivisionError"),
        ("leans", "No module named 'pytest'"),
    ],
)
def test_a_module_that_speaks_or_needs_more_is_reported(said: str, name: str, text: str) -> None:
    part = said.partition(f"odd_{name}:\n")[2].partition("\nodd_")[0]
    assert text in part


@pytest.mark.parametrize("name", ["quiet", "lazy", "guards"])
def test_a_module_that_is_silent_is_not(said: str, name: str) -> None:
    assert f"odd_{name}" not in said


def test_the_core_brings_its_own_dependencies_and_not_the_tools() -> None:
    brought = silent_imports.closure(silent_imports.requirements())
    assert {"torch", "numpy", "sympy", "typer", "tokenizers"} <= brought
    assert not {"pytest", "hypothesis", "scikit-learn", "lightning", "transformers"} & brought
    hidden = silent_imports.optional(silent_imports.requirements())
    assert "pytest" in hidden
    assert not {"torch", "numpy", "PIL", "rich"} & hidden
