"""Runs a converted folder: a model of transformers whose experts come from the files, through a cache.

import loader
model = loader.from_pretrained("mixtral-2bit", ram_cache="6GiB")
tokenizer = loader.load_tokenizer("mixtral-2bit")
"""

from loader.model import from_pretrained, load_tokenizer
from loader.stats import LayerStats, MoeStats

__all__ = ["LayerStats", "MoeStats", "from_pretrained", "load_tokenizer"]
