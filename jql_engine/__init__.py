"""Scores text with an encoder and regression heads fused into one graph."""

from jql_engine.bundle import Bundle
from jql_engine.data import Scores
from jql_engine.engine import Engine
from jql_engine.errors import EngineError

__version__ = "0.1.0"
__all__ = ["Bundle", "Engine", "EngineError", "Scores", "__version__"]
