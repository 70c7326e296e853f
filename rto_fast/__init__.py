"""rto-fast: Reinforced Token Optimization (arXiv 2404.18922), fast."""

import os

__version__ = "0.1.0"

# `kernels` and `configs` here link to the folders beside this one. Where the file system has no links, git leaves a text
# file in a link's place, and the folders are found beside. Never in site-packages, where `kernels` can be somebody else's.
if os.path.isfile(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))
