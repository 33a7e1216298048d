"""The parts of a transformers model, found and replaced; nothing here knows of quantizing plans.

Imports ``nn`` and below.

- ``names``: names relative to the base model, and short forms of many names;
- ``finding``: modules of a kind, by name;
- ``probing``: what a norm, a layer or an embedding computes, found out with numbers;
- ``surgery``: replaces modules, ties a head, tells the layers about the batch;
- ``adapters``: what peft merges into trainable layers, and what it must not.
"""
