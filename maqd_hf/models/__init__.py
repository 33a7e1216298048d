"""A transformers model as this package sees it; nothing here knows what will be quantised.

Imports ``nn`` and below.

- ``names``: names relative to the base model, and short forms of many names;
- ``finding``: modules of a kind, by name;
- ``probing``: what a norm, a layer or an embedding computes, found out with numbers;
- ``surgery``: replacing modules, tying a head, telling the layers about the batch;
- ``adapters``: what peft merges into trainable layers, and what it must not.
"""
