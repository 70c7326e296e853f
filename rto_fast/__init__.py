"""rto-fast: Reinforced Token Optimization (arXiv 2404.18922), fast."""

__version__ = "0.1.0"
