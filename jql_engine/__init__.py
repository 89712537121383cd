"""Scores text with an encoder and regression heads fused into one graph."""

import os

# Texts of other people pass through here, and nothing is reported to anyone. ONNX Runtime reads this when it is first
# imported; disable_telemetry_events, which the sessions call as well, comes after its first event.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from jql_engine.bundle import Bundle
from jql_engine.data import Scores
from jql_engine.engine import Engine
from jql_engine.errors import EngineError

__version__ = "0.1.0"
__all__ = ["Bundle", "Engine", "EngineError", "Scores", "__version__"]
