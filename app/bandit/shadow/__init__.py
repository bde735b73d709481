"""Shadow scoring: the ranking that the policy that did not serve would have made."""
