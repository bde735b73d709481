"""Shadow scoring: what the policy that does not serve would have chosen."""
