from __future__ import annotations

import pytest

from jql_engine.decision.report.figures import Figures
from jql_engine.decision.report.report import Sources, report_page, take_figures
from tests.decision.report.made import Made, make

MIN_GROUP = 100


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """Tests must not change it."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def sources(made) -> Sources:
    return Sources((str(made.scores),), group_column="lang", corpus=(str(made.corpus),), metrics=made.metrics)


@pytest.fixture(scope="session")
def figures(sources) -> Figures:
    return take_figures(sources, min_group=MIN_GROUP)


@pytest.fixture(scope="session")
def page(figures) -> str:
    return report_page(figures)
