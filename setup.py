"""Builds the CPU kernels, a plain C library called through ctypes; the rest is in pyproject.toml.

``optional``: without a compiler the install goes on and packed layers use the torch reference.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "maqd_hf.kernels._native",
            sources=sorted(glob("maqd_hf/kernels/csrc/*.c")),
            depends=[*glob("maqd_hf/kernels/csrc/*.h"), *glob("maqd_hf/kernels/csrc/*.inc")],
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-fopenmp",
                "-pthread",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-psabi",
            ],
            extra_link_args=["-fopenmp", "-pthread"],
            libraries=["m"],
            optional=True,
        )
    ]
)
