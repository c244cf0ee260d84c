"""No module imports itself by way of others. The layers are contracts in pyproject.toml (`make
lint`), which do not look at a package's own `__init__`, nor at rooms of one layer."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp  # of import-linter, in the extra `dev`
import pytest


def test_no_circle_not_even_a_lazy_one():
    """Imports inside of functions and for type checkers count."""
    graph = grimp.build_graph("editr2", "editr2_kernels", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "editr2.sessions.session" in imports["editr2.sessions"]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
