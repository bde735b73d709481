"""How the service is doing: samples of its metrics, states of what it depends on, and the figures made of them."""
