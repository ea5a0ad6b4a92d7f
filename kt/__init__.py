"""kt: knowledge transfer in vision. Stages and phases, five algorithms and their baselines, for mmengine models."""

__version__ = "0.1.0"
