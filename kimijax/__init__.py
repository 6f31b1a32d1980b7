"""kimijax: long-context research on the Kimi family of models in JAX."""
