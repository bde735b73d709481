"""What is wrong with a deployment, and what to do: facts in, lines out. It asks nothing itself."""
