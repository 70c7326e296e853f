"""What pyproject.toml cannot say: two packages of `rto_fast` lie beside it.

`rto_fast/kernels` and `rto_fast/configs` are links as well, because mypy and editors find modules by folder and not by
`package_dir`. On a file system without links they are text files, which do not belong into a wheel.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ["kernels", "configs"]
setup(
    packages=sorted({*find_namespace_packages(include=["rto_fast*"]), *(f"rto_fast.{name}" for name in BESIDE)}),
    package_dir={f"rto_fast.{name}": name for name in BESIDE},
    exclude_package_data={"rto_fast": BESIDE},
)
