"""Which folders become which packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# Two top-level folders are installed inside `cascade`: a top-level package named `kernels`
# would collide with others. Sub-packages added later are found without a change here.
MAPPED = ("kernels", "policies")

packages = find_packages(include=["cascade", "cascade.*"])
packages += [
    f"cascade.{name}"
    for name in find_packages(include=[p for folder in MAPPED for p in (folder, f"{folder}.*")])
]

setup(
    packages=packages,
    package_dir={f"cascade.{folder}": folder for folder in MAPPED},
    package_data={
        "cascade": [
            "py.typed",
            "evaluation/assets/*",
            *(f"checkpoints/**/*.{kind}" for kind in ("json", "safetensors", "md", "jinja")),
        ],
        "cascade.kernels": ["**/*.cu", "**/*.cuh"],
    },
)
