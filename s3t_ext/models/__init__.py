"""Models: small built-in ones, layer groups by parsed index, heads, batches. Knows neither shards nor deletions."""
