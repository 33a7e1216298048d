"""Builds the CPU kernel, a plain C library called through ctypes; the rest is in pyproject.toml.

``optional``: without a compiler the install goes on and packed layers use the torch reference.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "maqd_hf.kernels._native",
            sources=["maqd_hf/kernels/csrc/packed.c"],
            extra_compile_args=["-O3", "-fopenmp", "-std=gnu11"],
            extra_link_args=["-fopenmp"],
            libraries=["m"],
            optional=True,
        )
    ]
)
