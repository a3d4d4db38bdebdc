"""Text on disk to packed batches: `prepare` writes token shards, `packed` and `loader` read them."""
