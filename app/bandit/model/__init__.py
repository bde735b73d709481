"""The bandit's model, linear Thompson sampling: inputs, sufficient statistics, pooled prior and policies."""
