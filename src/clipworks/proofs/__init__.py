"""Experiments behind the papers' claims: one small file a paper, and the runner that publishes them."""
