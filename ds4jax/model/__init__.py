"""DeepSeek-V4 as Flax NNX modules; one file per idea of the architecture."""
