"""The model: inputs, sufficient statistics, pooled prior and policies."""
